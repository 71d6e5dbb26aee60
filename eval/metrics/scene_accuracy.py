"""Scene accuracy: is each prompted object, style, background and relation found in the picture?

The pictures are read by the scene checker: a detector fitted on real scenes only
(`scene_checker.py`) proposes, the real sprites decide (`scene_read.py`). A caption is judged only
on what it says: an open background cannot be wrong.

    python -m eval.metrics.scene_accuracy --fit      fits and writes the shipped checker
    python -m eval.metrics.scene_accuracy --check    its accuracy on fresh ground-truth scenes, as
                                                     they are and through the shipped VAE
"""

import argparse
import functools
import time
from pathlib import Path

import numpy as np

from cnxs_jax import errors
from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import SPLITS, make_scene
from eval.metrics import bootstrap, scene_checker, scene_read

ASSETS = Path(emoji_scenes.__file__).parent.parent / "assets"
CHECKER, VAE = ASSETS / "scene_checker", ASSETS / "pixart_tiny" / "vae"
SIZE = 64  # pixels: the side of the scenes that the checker is fitted on
ITEMS = ("objects", "style", "background", "relation")
COVERED = 0.5  # `Detection.covered` above which the back object of "in front of" is covered
BATCH = 16
# (steps, fraction of scenes forced to have one object in front of another): such scenes are a
# sixth of the world's, too few to learn them from in the time.
PHASES = ((2400, 0.0), (1600, 0.6))


def judge(detections, background, prompt):
    """Verdicts {item: bool} of one picture on what its prompt says.

    Args:
        detections: `scene_checker.Detection`s; the best one of a concept counts, and a concept
            prompted k times needs k detections.
        background: background word read from the picture.
        prompt: {"concepts", "style", "background", "relation"}, None where the caption is silent.

    Returns:
        {"object 0": …, "object 1": …, "style": …, "background": …, "relation": …}, only the items
        that the prompt has. The style is right if every prompted object that was found wears it.
    """
    pool = list(detections)
    found = []
    for concept in prompt["concepts"]:
        match = next((d for d in pool if d.concept == concept), None)
        if match is not None:
            pool.remove(match)
        found.append(match)
    verdicts = {f"object {i}": d is not None for i, d in enumerate(found)}
    if prompt["style"] is not None:
        seen = [d.style for d in found if d is not None]
        verdicts["style"] = bool(seen) and all(s == prompt["style"] for s in seen)
    if prompt["background"] is not None:
        verdicts["background"] = background == prompt["background"]
    if prompt["relation"] is not None:
        by_concept = dict(zip(prompt["concepts"], found, strict=True))
        first, kind, second = prompt["relation"]
        verdicts["relation"] = related(by_concept.get(first), kind, by_concept.get(second))
    return verdicts


def related(first, kind, second):
    """Whether two detections stand in the relation; a missing one never does.

    "left of" and "above": by centres, and more along the axis than across it. "in front of": the
    second one is covered, more than the first, and they touch.
    """
    if first is None or second is None:
        return False
    dy, dx = second.y - first.y, second.x - first.x
    if kind == "left of":
        return dx > abs(dy)
    if kind == "above":
        return dy > abs(dx)
    near = np.hypot(dy, dx) < 0.8 * (first.size + second.size)
    return bool(near and second.covered > max(first.covered, COVERED))


def extra_objects(detections, prompt):
    """Number of detections beyond the prompted ones."""
    left = list(prompt["concepts"])
    return sum(not _take(left, d.concept) for d in detections)


def _take(words, word):
    if word in words:
        words.remove(word)
        return True
    return False


def score(read, images, prompts, chance_rounds=20, seed=0):
    """Scene accuracy of pictures.

    Args:
        read: from `load_checker`.
        images: uint8 `[N, H, W, 3]`.
        prompts: N prompt dicts (`judge`).
        chance_rounds: reshuffles of the prompts among the pictures for the chance level.

    Returns:
        (figures, verdicts): `figures` has `objects`, `style`, `background`, `relation` (per item),
        `items` (mean over all items), `all_correct` (per picture), each {"value", "low", "high",
        "n", "chance"}, and `extra_objects` (mean number a picture). Intervals are 95 %: Wilson for
        one verdict a picture, bootstrap over pictures for several. `verdicts` has `judge`'s dicts.
    """
    if len(images) != len(prompts) or not len(prompts):
        raise errors.DataError(
            f"{len(images)} pictures for {len(prompts)} prompts", "scene_accuracy"
        )
    found, backgrounds = read(images)
    verdicts = [judge(*x) for x in zip(found, backgrounds, prompts, strict=True)]
    figures = summarise(verdicts, seed)
    rng = np.random.default_rng(seed)
    chance = []
    for _ in range(chance_rounds):
        order = rng.permutation(len(prompts))
        moved = [judge(f, b, prompts[i]) for f, b, i in zip(found, backgrounds, order, strict=True)]
        chance.append(rates(moved))
    for name in figures:
        figures[name]["chance"] = float(np.mean([c[name] for c in chance]))
    extra = [extra_objects(f, p) for f, p in zip(found, prompts, strict=True)]
    figures["extra_objects"] = bootstrap.mean(extra)
    return figures, verdicts


def _counts(verdicts):
    """{name: (right [N], total [N])} a picture, for each of ITEMS, `items` and `all_correct`."""
    kinds = {name: [] for name in ITEMS}
    for v in verdicts:
        groups = {name: [] for name in ITEMS}
        for item, ok in v.items():
            groups["objects" if item.startswith("object ") else item].append(ok)
        for name in ITEMS:
            kinds[name].append((sum(groups[name]), len(groups[name])))
    out = {name: np.array(pairs, np.float64).T for name, pairs in kinds.items()}
    out["items"] = sum(out[name] for name in ITEMS)
    out["all_correct"] = np.array([[all(v.values()) for v in verdicts], [1] * len(verdicts)], float)
    return {name: pair for name, pair in out.items() if pair[1].sum()}


def rates(verdicts):
    """{name: fraction right} for every kind of item that occurs, `items` and `all_correct`."""
    return {name: float(ok.sum() / n.sum()) for name, (ok, n) in _counts(verdicts).items()}


def summarise(verdicts, seed=0, resamples=1000):
    """{name: {"value", "low", "high", "n"}} of verdicts; see `score`."""
    return {
        name: bootstrap.proportion(ok.sum(), n.sum())
        if n.max() <= 1
        else bootstrap.ratio(ok, n, resamples, seed)
        for name, (ok, n) in _counts(verdicts).items()
    }


@functools.cache
def load_checker(directory=CHECKER):
    """`read(images)` of the shipped checker; CheckpointError if it is missing or damaged."""
    return scene_read.reader(*scene_checker.load(directory), emoji_scenes.world())


def vocabulary(world):
    """The checker's words for a `scenes.World`."""
    return scene_checker.Vocabulary(world.concepts, world.styles, tuple(world.backgrounds))


def truth(scene):
    """A scene's objects as the checker's targets: (concept, style, y, x, size, covered)."""
    rows = []
    for o in scene["objects"]:
        x0, y0, x1, y1 = o["box"]
        centre = ((y0 + y1) / 2, (x0 + x1) / 2)
        rows.append((o["concept"], o["style"], *centre, o["extent"], 1 - o["visible"]))
    return rows


def real_scenes(world, number, seed, size=SIZE, in_front=0.0):
    """Ground-truth scenes of all splits in turn: the checker must know every held-out pair.

    Args:
        in_front: fraction of scenes forced to have one object in front of another.
    """
    rng = np.random.default_rng([seed, number])
    scenes = []
    for i in range(number):
        spec = {}
        if rng.random() < in_front:
            picks = rng.choice(len(world.concepts), rng.integers(2, 4), replace=False)
            spec = {"concepts": [world.concepts[k] for k in picks], "relation": "in front of"}
            spec["style"] = world.styles[rng.integers(len(world.styles))]
        split = SPLITS[i % len(SPLITS)]
        scenes.append(make_scene(world, rng, spec, size=size, split=split, truth=False))
    return scenes


def training_batch(world, seed, in_front, batch_size=BATCH):
    """(images, targets) of fresh scenes; seeds above a million, apart from those of `check`."""
    scenes = real_scenes(world, batch_size, 1_000_000 + seed, in_front=in_front)
    words = vocabulary(world)
    target = scene_checker.targets([truth(s) for s in scenes], words, SIZE)
    backgrounds = [words.backgrounds.index(s["background"]) for s in scenes]
    target["background"] = np.array(backgrounds, np.int32)
    return np.stack([s["image"] for s in scenes]), target


def fit(directory, phases=PHASES, log=print):
    """Fits the checker of the default world on real scenes and writes it to `directory`."""
    world, begin = emoji_scenes.world(), time.time()
    words, params = vocabulary(world), None
    for number, (steps, in_front) in enumerate(phases):
        first = 100_000 * number

        def sample(step, first=first, in_front=in_front):
            return training_batch(world, first + step, in_front)

        params = scene_checker.fit(sample, words, steps, params, seed=number, log=log)
    info = {
        "command": "python -m eval.metrics.scene_accuracy --fit",
        "scenes": sum(steps for steps, _ in phases) * BATCH,
        "seconds": round(time.time() - begin),
    }
    scene_checker.save(directory, params, words, info)
    return info


def shown(scene):
    """The prompt that says everything a scene shows."""
    keys = ("style", "background", "relation")
    return {"concepts": [o["concept"] for o in scene["objects"]], **{k: scene[k] for k in keys}}


def check(read, number=2000, seed=0, change=None):
    """Scores ground-truth scenes, asked for everything they show.

    Args:
        change: function on uint8 images `[N,H,W,3]`, such as an autoencoder's round trip.
    """
    scenes = real_scenes(emoji_scenes.world(), number, seed)
    images = np.stack([s["image"] for s in scenes])
    images = images if change is None else change(images)
    return score(read, images, [shown(s) for s in scenes])[0]


def blur(images, radius=1.0):
    """Gaussian blur, standard deviation in pixels: a stand-in for an autoencoder."""
    from PIL import Image, ImageFilter

    soft = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(i).filter(soft)) for i in images])


def report(directory, number=2000, vae=VAE, batch_size=50):
    """Prints and returns {"ground truth" | "through the VAE": figures} of a fitted checker.

    Args:
        number: of ground-truth scenes. The aim is 0.99 of the items through the VAE.
        vae: directory of the autoencoder whose round trips are read.
    """
    from cnxs_jax.pipelines.load import load_model
    from eval.draw import round_trip

    read, through = load_checker(directory), round_trip(*load_model(vae), batch_size)
    table = {}
    for name, change in {"ground truth": None, "through the VAE": through}.items():
        begin = time.time()
        table[name] = check(read, number, change=change)
        values = {k: round(v["value"], 4) for k, v in table[name].items()}
        print(f"{name}: {number} scenes, {number / (time.time() - begin):.0f} a second", values)
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fit", action="store_true", help="fit the checker on real scenes")
    parser.add_argument("--steps", type=int, help="of each phase of --fit, to test the plumbing")
    parser.add_argument("--check", action="store_true", help="accuracy on ground-truth scenes")
    parser.add_argument("--scenes", type=int, default=2000, help="how many --check reads")
    parser.add_argument("--vae", type=Path, default=VAE, help="autoencoder of --check")
    parser.add_argument("--directory", type=Path, default=CHECKER)
    args = parser.parse_args(argv)
    if not (args.fit or args.check):
        raise errors.ConfigError("nothing to do", "arguments", "give --fit, --check or both")
    if args.scenes < 1:
        raise errors.ConfigError(f"{args.scenes} scenes", "--scenes", "use at least 1")
    if args.steps is not None and (args.steps < 1 or args.directory == CHECKER):
        what = f"{args.steps} steps into {args.directory}"
        raise errors.ConfigError(what, "--steps", "at least 1, with a --directory of its own")
    if args.fit:
        phases = [(args.steps or steps, in_front) for steps, in_front in PHASES]
        print(fit(args.directory, phases, log=lambda s: print(s, flush=True)))
    if args.check:
        report(args.directory, args.scenes, args.vae)


if __name__ == "__main__":
    errors.run_main(main)
