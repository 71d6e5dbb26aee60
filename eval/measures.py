"""The metrics by name: what each needs, and the columns that it gives of one row's pictures.

Every figure is `{"value", "low", "high", "n"}` (a distance has `num_x` and `num_y`), with 95 %
intervals. A distance is named after the network that it looks through, and only that of FID's own
Inception is called "fid".
"""

import dataclasses
import functools

from cnxs_jax.errors import ConfigError, did_you_mean
from eval import map_measures, networks
from eval.metrics import (
    agreement,
    bootstrap,
    clip_features,
    features,
    fid,
    mmd,
    prdc,
    retrieval,
    scene_accuracy,
)
from eval.metrics import images as quality
from eval.metrics import kid as kernel_distance

NEEDS = {
    "captions": "captions: --prompts, or a .txt beside every picture",
    "facts": "scenes of the embedded world, which say what each caption asks for",
    "set": "real pictures: --reference FOLDER or FILE.npz",
    "real": "real pictures, not their statistics: --reference FOLDER",
    "pairs": "pictures to pair with: several rows (the first one is the reference), or "
    "--images A --reference B with the same file names",
    "truth": "scenes drawn with a controller: --config and --workdir of a controller's run",
    "maps": "two folders of maps with the same file names: --images A --reference B",
}
SELECTED = "the network of --features"  # in `Metric.networks`
RETRIEVAL_POOL = 100  # texts a picture, its own included (Xu et al. 2018)


class Sample:
    """Pictures with their prompts; what networks make of them is computed once.

    Args:
        images: uint8 `[N, H, W, 3]`.
        prompts: `plan.Prompts`, or None for real pictures.
        tools: `networks.Tools`.
        splits: {split: Sample} of further prompts.
    """

    def __init__(self, images, prompts, tools, splits=None):
        self.images, self.prompts, self.tools = images, prompts, tools
        self.splits, self._features = splits or {}, {}

    def features(self, network):
        """float32 `[N, d]`."""
        if network not in self._features:
            self._features[network] = self.tools.extractor(network)[1](self.images)
        return self._features[network]

    @functools.cached_property
    def scored(self):
        """`scene_accuracy.score`: (figures, verdicts)."""
        return scene_accuracy.score(self.tools.checker(), self.images, self.prompts.facts)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One name of `--metrics`.

    Attributes:
        figures: (sample, pair, real, tools) -> {column: figure}; `pair` is None for the real
            pictures themselves, `real` a Sample or `fid.Moments`.
        needs: of NEEDS.
        networks: of `networks.FILES`, or SELECTED.
        least: pictures, and real ones where it reads them.
    """

    figures: object
    needs: tuple
    networks: tuple = ()
    least: int = 1


def scenes(sample, pair, real, tools):
    """Scene accuracy, and that of the held-out splits."""
    columns = (*scene_accuracy.ITEMS, "items", "all_correct", "extra_objects")
    found = {k: sample.scored[0][k] for k in columns if k in sample.scored[0]}
    for split, other in sample.splits.items():
        found |= _split_figures(split, other)
    return found


def _split_figures(split, sample):
    """Columns of a held-out split; of pairs, only the held-out object itself and its style."""
    figures, verdicts = sample.scored
    if split == "heldout_pairs":
        asked = zip(verdicts, sample.prompts.facts, sample.prompts.heldout, strict=True)
        rows = [
            {"object 0": v[f"object {f['concepts'].index(c)}"], "style": v["style"]}
            for v, f, c in asked
        ]
        own = scene_accuracy.summarise(rows)
        return {
            "held-out pair: object": own["objects"],
            "held-out pair: style": own["style"],
            "held-out pair: all correct": figures["all_correct"],
        }
    if split == "heldout_relations":
        return {
            "held-out relation": figures["relation"],
            "held-out relation: all correct": figures["all_correct"],
        }
    return {f"{split}: all correct": figures["all_correct"]}


def agree(sample, pair, real, tools):
    """RMSE and PSNR to the paired pictures, the same verdicts, sharpness against real ones."""
    found = {}
    if isinstance(real, Sample):
        found["sharpness"] = agreement.sharpness(sample.images, real.images)
    if pair is not None:
        found |= agreement.pixel_agreement(sample.images, pair.images)
        if sample.prompts.facts is not None and pair.prompts is not None:
            verdicts = sample.scored[1], pair.scored[1]
            found["same_verdicts"] = agreement.verdict_agreement(*verdicts)
    return found


def frechet(network):
    """Frechet distance on a network's features (None: the selected one's)."""

    def figures(sample, pair, real, tools):
        which = network or tools.features
        opened = tools.extractor(which)
        if opened is None:
            return {fid.name(which): MISSING}
        other = real.features(which) if isinstance(real, Sample) else real
        return {fid.name(opened[0]): fid.distance(sample.features(which), other).as_dict()}

    return figures


def on_features(prefix, distance):
    """`{prefix_NETWORK: distance(features, real features)}`; several if `distance` gives a dict."""

    def figures(sample, pair, real, tools):
        opened = tools.extractor(tools.features)
        if opened is None:
            return {f"{prefix}_{tools.features}": MISSING}
        found = distance(sample.features(tools.features), real.features(tools.features))
        if isinstance(found, mmd.Estimate):
            return {f"{prefix}_{opened[0]}": found.as_dict()}
        return {f"{k}_{opened[0]}": v for k, v in found.items()}

    return figures


def cmmd(sample, pair, real, tools):
    name = tools.clip.name
    if name != clip_features.CMMD:
        raise ConfigError(
            f"CMMD is defined on CLIP ViT-L/14@336, this is {name}",
            "--metrics=cmmd",
            f"the weights of {clip_features.CMMD}, or --metrics=mmd --features=clip",
        )
    x, y = sample.features("clip"), real.features("clip")
    return {"cmmd": {"value": mmd.cmmd(x, y)} | mmd.cmmd_interval(x, y)}


def clip_score(sample, pair, real, tools):
    scores = retrieval.clip_score(sample.features("clip"), _texts(sample, tools))
    return {f"clip_score_{tools.clip.name.removeprefix('clip_')}": bootstrap.mean(scores)}


def r_precision(sample, pair, real, tools):
    pool = min(RETRIEVAL_POOL, len(sample.images))
    found = retrieval.retrieval_precision(sample.features("clip"), _texts(sample, tools), pool=pool)
    return {f"r_precision_of_{pool}_{tools.clip.name.removeprefix('clip_')}": found}


def _texts(sample, tools):
    return tools.clip.embed_texts(sample.prompts.captions)


def paired(column, distance):
    """`{column: mean of distance(images, pair's images) [N]}`."""

    def figures(sample, pair, real, tools):
        if pair is None:
            return {}
        return {column: agreement.mean_or_infinite(distance(tools)(sample.images, pair.images))}

    return figures


MISSING = f"not run ({features.INSTALL})"
KID = on_features("kid", kernel_distance.kid)
PRDC = on_features("prdc", lambda x, y: prdc.prdc(y, x))
METRICS = {
    "scene_accuracy": Metric(scenes, ("facts",)),
    "kid": Metric(KID, ("real",), (SELECTED,), least=3),
    "agreement": Metric(agree, ("pairs",)),
    "fid": Metric(frechet("inception"), ("set",), ("inception",), least=2),
    "fd": Metric(frechet(None), ("set",), (SELECTED,), least=2),
    "mmd": Metric(on_features("mmd_rbf", mmd.mmd_rbf), ("real",), (SELECTED,), least=3),
    "cmmd": Metric(cmmd, ("real",), ("clip",), least=3),
    "prdc": Metric(PRDC, ("real",), (SELECTED,), least=6),
    "clip_score": Metric(clip_score, ("captions",), ("clip",), least=2),
    "retrieval": Metric(r_precision, ("captions",), ("clip",), least=2),
    "lpips": Metric(paired("lpips", lambda tools: tools.lpips), ("pairs",), ("vgg", "lpips")),
    "ssim": Metric(paired("ssim", lambda tools: quality.ssim), ("pairs",)),
    "psnr": Metric(paired("psnr", lambda tools: quality.psnr), ("pairs",)),
    "hed": Metric(paired("hed_distance", lambda tools: tools.hed_distance), ("pairs",), ("hed",)),
    "edges": Metric(map_measures.edge_maps, ("maps",)),
    "soft_edges": Metric(map_measures.soft_edge_maps, ("maps",)),
    "depth": Metric(map_measures.depth_maps, ("maps",)),
    "masks": Metric(map_measures.mask_maps, ("maps",)),
    "control_edges": Metric(map_measures.control_edges, ("truth",)),
    "control_masks": Metric(map_measures.control_masks, ("truth",)),
    "control_depth": Metric(map_measures.control_depth, ("truth",)),
    "control_hed": Metric(map_measures.control_hed, ("truth",), ("hed",)),
}
CONTROL = ("control_edges", "control_masks", "control_depth")
USUAL = ("scene_accuracy", "kid", "agreement")


def check(metrics):
    """The metrics asked for, as a tuple; ConfigError names an unknown one."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                f"unknown metric {name!r}.{did_you_mean(name, METRICS)}",
                "--metrics",
                f"one or more of {','.join(METRICS)}",
            )
    if not metrics:
        raise ConfigError("no metrics", "--metrics", f"one or more of {','.join(METRICS)}")
    return tuple(dict.fromkeys(metrics))


def check_weights(metrics, weights, chosen, optional=False):
    """Raises ConfigError or CheckpointError for a metric whose weights are not there.

    `optional`: without the package that has the usual network, its figures are "not run".
    """
    for name in metrics:
        for network in METRICS[name].networks:
            network = chosen if network == SELECTED else network
            if not (optional and network == networks.FEATURES[0] and network not in weights):
                networks.check_weights(network, weights, name)


def usual(has):
    """The metrics of `USUAL` that a plan can have; ConfigError if it can have none."""
    found = tuple(m for m in USUAL if all(has[need] for need in METRICS[m].needs))
    if not found:
        raise ConfigError("nothing to compare with", "--reference", NEEDS["set"])
    return found


def check_needs(metrics, has):
    """Raises ConfigError for a metric that lacks what it compares with."""
    for name in metrics:
        for need in METRICS[name].needs:
            # Agreement still says how sharp a single row is.
            if not has[need] and not (name == "agreement" and has["real"]):
                what = f"the metric {name!r} needs {NEEDS[need]}"
                able = [m for m in METRICS if all(has[n] for n in METRICS[m].needs)]
                raise ConfigError(what, "--metrics", f"here: {','.join(able) or 'none'}")


def check_numbers(metrics, drawn, real=None, where="--metrics"):
    """Raises ConfigError for a metric that needs more pictures than there are.

    Args:
        drawn: pictures a row.
        real: real pictures; None: statistics, or not known yet.
        where: what named the metrics.
    """
    for name in metrics:
        metric = METRICS[name]
        compared = real is not None and {"set", "real"} & set(metric.needs)
        if min(drawn, real if compared else drawn) < metric.least:
            found = f"{drawn} and {real} real ones" if compared else drawn
            raise ConfigError(
                f"the metric {name!r} needs {metric.least} pictures or more, got {found}",
                where,
                "more pictures (--num_prompts, --num_real, larger folders), or other metrics",
            )


def figures(metrics, sample, pair, real, tools):
    """{column: figure} of all metrics of one row."""
    out = {}
    for name in metrics:
        out |= METRICS[name].figures(sample, pair, real, tools)
    return out
