"""The networks that metrics look through, by name: which file each needs, and opening them once.

--weights inception=pt_inception-2015-12-05-6726825d.pth --weights clip=clip-vit-large-patch14
"""

import dataclasses
import functools
from pathlib import Path

from cnxs_jax.control import hed
from cnxs_jax.convert import hed as hed_weights
from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean
from eval.metrics import (
    clip_features,
    edges,
    features,
    inception,
    inputs,
    lpips,
    scene_accuracy,
    scene_maps,
)

# {name: its file, and where it comes from}
FILES = {
    "efflite0": f"EfficientNet-Lite0: {features.FILE.split('/')[-1]}; {features.INSTALL}",
    "inception": f"FID's Inception: {inception.PUBLISHED}",
    "clip": f"CLIP: {clip_features.LAYOUT}",
    "vgg": "torchvision's VGG16: vgg16-397923af.pth",
    "lpips": "LPIPS's linear heads: lpips/weights/v0.1/vgg.pth of the `lpips` package",
    "hed": f"HED: {hed_weights.INSTALL}",
}
HED_BATCH = 8
FEATURES = ("efflite0", "inception", "clip")  # those that `--features` may name


def parse_weights(words):
    """`["inception=PATH", ...]` -> {"inception": "PATH"}.

    Raises:
        ConfigError: no `name=PATH`, or an unknown name.
    """
    found = {}
    for word in words:
        name, given, path = word.partition("=")
        if not given or not path:
            raise ConfigError(f"{word!r} is no name=PATH", "--weights", "e.g. inception=FILE.pth")
        if name not in FILES:
            hint = did_you_mean(name, FILES)
            fix = "\n       ".join([f"{k}: {v}" for k, v in FILES.items()])
            raise ConfigError(f"no network is called {name!r}.{hint}", "--weights", fix)
        found[name] = path
    return found


def check_features(name):
    """`--features`; ConfigError for an unknown network."""
    if name not in FEATURES:
        hint = did_you_mean(name, FEATURES)
        raise ConfigError(f"no features {name!r}.{hint}", "--features", f"one of {FEATURES}")
    return name


def check_weights(name, weights, metric):
    """Raises where a metric's network has no file: before anything is drawn."""
    if name == "efflite0" and name not in weights and features.weights_path() is not None:
        return
    if name == "hed" and name not in weights and hed_weights.packaged() is not None:
        return
    if name not in weights:
        raise ConfigError(
            f"the metric {metric!r} needs {FILES[name]}", "--weights", f"--weights {name}=PATH"
        )
    if not Path(weights[name]).exists():
        raise CheckpointError(f"there is no {weights[name]}", f"--weights {name}", FILES[name])


@dataclasses.dataclass
class Tools:
    """The networks, opened when they are first used.

    Args:
        weights: {name: path}.
        features: the network of fd, kid, mmd and prdc.
        extractors: {network: (name in figures, images -> features)} that are given as they are.
        read: the scene checker; the shipped one by default.
    """

    weights: dict = dataclasses.field(default_factory=dict)
    features: str = "efflite0"
    extractors: dict = dataclasses.field(default_factory=dict)
    read: object = None

    def checker(self):
        """`read(images)` of the scene checker."""
        return self.read or scene_accuracy.load_checker()

    def depth_reader(self):
        """`read(images, asked depth)` of `scene_maps`."""
        return scene_maps.load_depth_reader()

    def hed_distance(self, images, others):
        """Mean absolute difference `[N]` of the soft edges of uint8 pictures `[N, H, W, 3]`."""
        return edges.soft_edge_distance(self._hed(images), self._hed(others))

    def _hed(self, images):
        """Soft edges `[N, H, W]`, a few pictures at a time: the detector enlarges small ones."""
        path = self.weights.get("hed")
        return inputs.in_batches(lambda x: hed.edges(x, path), HED_BATCH, images)

    def extractor(self, network):
        """(name in figures, images -> features `[N, d]`), or None without the packaged weights."""
        if network not in self.extractors:
            self.extractors[network] = self._open(network)
        return self.extractors[network]

    def _open(self, network):
        if network == "clip":
            return self.clip.name, self.clip.embed_images
        path = self.weights.get(network)
        if network == "inception":
            return inception.network(path), inception.extractor(inception.load(path))
        if path is None and features.weights_path() is None:
            return None
        return network, features.extractor(features.load(path))

    @functools.cached_property
    def clip(self):
        """`clip_features.Clip`."""
        return clip_features.load_clip(self.weights["clip"])

    @functools.cached_property
    def lpips(self):
        """`lpips(images, reference) -> [N]`."""
        return lpips.distance(lpips.load(self.weights["vgg"], self.weights["lpips"]))
