"""A small convolutional detector that reads an emoji scene back: objects, styles, background.

It is fitted on real scenes only (`python -m eval.metrics.scene_accuracy --fit`), never on a model's
samples, with the blur, colour shifts and compression noise that autoencoders leave. Objects are
points on a grid of 4 px cells in the manner of CenterNet (Zhou et al. 2019, "Objects as Points").
"""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnxs_jax import tree
from cnxs_jax.errors import CheckpointError, DataError
from cnxs_jax.storage import write_json

STRIDE = 4
FOCAL_POWER, NEAR_POWER = 2.0, 4.0  # alpha and beta of CenterNet's focal loss
COVERED = 0.05  # an object of which more than this fraction is hidden counts as covered
THRESHOLD = 0.35  # of an object's peak; chosen on real scenes, see `fit`


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that a checker knows, in the order of its outputs."""

    concepts: tuple
    styles: tuple
    backgrounds: tuple


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object found: words, centre and size in pixels; probability that another covers it."""

    concept: str
    style: str
    y: float
    x: float
    size: float
    covered: float
    score: float


class Residual(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.features, (3, 3), name="conv1")(_norm(x, "norm1"))
        return x + nn.Conv(self.features, (3, 3), name="conv2")(_norm(h, "norm2"))


def _norm(x, name):
    norm = nn.GroupNorm(num_groups=8, epsilon=1e-5, use_fast_variance=False, name=name)
    return jax.nn.relu(norm(x))


class Checker(nn.Module):
    """Images `[B, H, W, 3]` in [-1, 1] to maps on the `[H / 4, W / 4]` grid.

    Returns a dict: `heat [B,h,w,concepts]` and `style [B,h,w,styles]` logits, `shift [B,h,w,2]`
    (centre - cell centre, in cells), `size [B,h,w]` (log of pixels / 24), `covered [B,h,w]` logit,
    `background [B,backgrounds]` logits.
    """

    concepts: int
    styles: int
    backgrounds: int
    width: int = 48

    @nn.compact
    def __call__(self, x):
        w = self.width
        x = nn.Conv(w // 2, (3, 3), 2, name="stem")(x)
        fine = nn.Conv(w, (3, 3), 2, name="down1")(_norm(x, "stem_norm"))
        fine = Residual(w, name="fine1")(fine)
        wide = nn.Conv(w * 5 // 3, (3, 3), 2, name="down2")(_norm(fine, "down2_norm"))
        for i in range(2):
            wide = Residual(w * 5 // 3, name=f"wide{i + 1}")(wide)
        up = nn.Conv(w, (1, 1), name="up")(_norm(wide, "up_norm"))
        up = jnp.repeat(jnp.repeat(up, 2, 1), 2, 2)[:, : fine.shape[1], : fine.shape[2]]
        x = Residual(w, name="fine2")(fine + up)
        x = _norm(nn.Conv(2 * w, (3, 3), name="head")(_norm(x, "head_norm")), "out_norm")
        heat_bias = nn.initializers.constant(-4.0)  # objects are rare: start from "none"
        geometry = nn.Conv(4, (1, 1), name="geometry")(x)
        return {
            "heat": nn.Conv(self.concepts, (1, 1), bias_init=heat_bias, name="heat")(x),
            "style": nn.Conv(self.styles, (1, 1), name="style")(x),
            "shift": geometry[..., :2],
            "size": geometry[..., 2],
            "covered": geometry[..., 3],
            "background": nn.Conv(self.backgrounds, (1, 1), name="background")(x).mean((1, 2)),
        }


def normalise(images):
    """uint8 to [-1, 1] float32."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def targets(scenes, vocabulary, side):
    """Training targets of scenes.

    Args:
        scenes: one list of (concept, style, y, x, size, covered) an image, pixels.
        side: of the images, in pixels.

    Returns:
        arrays: `heat [B,h,w,C]` with a Gaussian around each centre, `where [B,M,2]` cells,
        `style`, `shift`, `size`, `covered`, `valid` `[B,M(,2)]` for up to M = 4 objects.
    """
    cells, most = -(-side // STRIDE), 4
    number = len(scenes)
    out = {
        "heat": np.zeros((number, cells, cells, len(vocabulary.concepts)), np.float32),
        "where": np.zeros((number, most, 2), np.int32),
        "style": np.zeros((number, most), np.int32),
        "shift": np.zeros((number, most, 2), np.float32),
        "size": np.zeros((number, most), np.float32),
        "covered": np.zeros((number, most), np.float32),
        "valid": np.zeros((number, most), np.float32),
    }
    rows = np.arange(cells)
    for b, objects in enumerate(scenes):
        if len(objects) > most:
            raise DataError(f"a scene of {len(objects)} objects; the checker knows up to {most}")
        for m, (concept, style, y, x, size, covered) in enumerate(objects):
            cell = np.clip((int(y // STRIDE), int(x // STRIDE)), 0, cells - 1)
            spread = max(size / STRIDE / 6, 0.6)
            bump = np.exp(-((rows - cell[0])[:, None] ** 2 + (rows - cell[1]) ** 2) / 2 / spread**2)
            heat = out["heat"][b, :, :, vocabulary.concepts.index(concept)]
            np.maximum(heat, bump, out=heat)
            out["where"][b, m] = cell
            out["style"][b, m] = vocabulary.styles.index(style)
            out["shift"][b, m] = np.array([y, x]) / STRIDE - cell - 0.5
            out["size"][b, m] = np.log(size / 24)
            out["covered"][b, m] = covered > COVERED
            out["valid"][b, m] = 1
    return out


def loss(outputs, target):
    """Penalty-reduced focal loss (CenterNet equation 1) plus terms at the objects' own cells."""
    positive = target["heat"] > 0.999
    log_p, log_not = jax.nn.log_sigmoid(outputs["heat"]), jax.nn.log_sigmoid(-outputs["heat"])
    p = jnp.exp(log_p)
    near = (1 - target["heat"]) ** NEAR_POWER
    hit, miss = (1 - p) ** FOCAL_POWER * log_p, near * p**FOCAL_POWER * log_not
    valid = target["valid"]
    count = jnp.maximum(valid.sum(), 1)
    heat = -jnp.where(positive, hit, miss).sum() / count

    row, column = target["where"][..., 0], target["where"][..., 1]
    at = jax.tree.map(
        lambda v: v[jnp.arange(len(v))[:, None], row, column],
        {k: outputs[k] for k in ("style", "shift", "size", "covered")},
    )
    style = optax.softmax_cross_entropy_with_integer_labels(at["style"], target["style"])
    covered = optax.sigmoid_binary_cross_entropy(at["covered"], target["covered"])
    place = jnp.abs(at["shift"] - target["shift"]).sum(-1) + jnp.abs(at["size"] - target["size"])
    background = optax.softmax_cross_entropy_with_integer_labels(
        outputs["background"], target["background"]
    )
    objects = ((style + covered + place) * valid).sum() / count
    return heat + objects + background.mean()


def augment(key, images):
    """What an autoencoder or a JPEG may do to a picture: blur, colour shift, noise, 4 px blocks.

    Args:
        images: float `[B, H, W, 3]` in [-1, 1]. Half of them stay nearly clean.
    """
    keys = jax.random.split(key, 6)
    batch = images.shape[0]
    per_image = (batch, 1, 1, 1)
    strength = jax.random.uniform(keys[0], per_image) * jax.random.bernoulli(
        keys[5], 0.7, per_image
    )
    for _ in range(2):  # two binomial passes: standard deviation up to one pixel
        images = images + strength * (_binomial(images) - images)
    gain = 1 + 0.06 * jax.random.normal(keys[1], (batch, 1, 1, 3)) * strength
    shift = 0.05 * jax.random.normal(keys[2], (batch, 1, 1, 3)) * strength
    coarse = (batch, images.shape[1] // 4, images.shape[2] // 4, 3)
    noise = jax.image.resize(jax.random.normal(keys[3], coarse), images.shape, "bilinear")
    noise = 0.06 * noise + 0.08 * jax.random.normal(keys[4], images.shape)
    return jnp.clip(images * gain + shift + noise * strength, -1, 1)


def _binomial(x):
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (1, 1)
        padded = jnp.pad(x, pads, mode="edge")
        left = jax.lax.slice_in_dim(padded, 0, x.shape[axis], axis=axis)
        right = jax.lax.slice_in_dim(padded, 2, x.shape[axis] + 2, axis=axis)
        x = (left + 2 * x + right) / 4
    return x


def detect(outputs, vocabulary, threshold=THRESHOLD):
    """Peaks of the heat maps: one list of `Detection`s an image, best first.

    A peak is the largest of its 3x3 cells in its own concept's map. Peaks of different concepts at
    the same cell both stay, so that an ambiguous blob is counted as `extra`.
    """
    heat = 1 / (1 + np.exp(-np.asarray(outputs["heat"], np.float64)))
    padded = np.pad(heat, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = heat.shape[1:3]
    around = np.max([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], 0)
    found = [[] for _ in heat]
    style, shift = np.asarray(outputs["style"]), np.asarray(outputs["shift"])
    size, covered = np.asarray(outputs["size"]), np.asarray(outputs["covered"])
    for b, i, j, c in np.argwhere((heat >= threshold) & (heat == around)):
        found[b].append(
            Detection(
                vocabulary.concepts[c],
                vocabulary.styles[int(style[b, i, j].argmax())],
                float((i + 0.5 + shift[b, i, j, 0]) * STRIDE),
                float((j + 0.5 + shift[b, i, j, 1]) * STRIDE),
                float(24 * np.exp(np.clip(size[b, i, j], -3, 3))),
                float(1 / (1 + np.exp(-covered[b, i, j]))),
                float(heat[b, i, j, c]),
            )
        )
    return [sorted(f, key=lambda d: -d.score) for f in found]


def fit(sample, vocabulary, num_steps, params=None, learning_rate=2e-3, seed=0, log=print):
    """Fits a checker on real scenes.

    Args:
        sample: `sample(step) -> (images uint8 [B,H,W,3], target dict)`, fresh scenes each step.
        num_steps: AdamW steps under a one-cycle schedule.
        params: to start from, random when None.

    Returns:
        params.
    """
    module = make(vocabulary)
    images, _ = sample(0)
    key = jax.random.key(seed)
    if params is None:
        params = module.init(key, normalise(images[:1]))["params"]
    schedule = optax.cosine_onecycle_schedule(num_steps, learning_rate, 0.1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-3)
    )

    @jax.jit
    def step(params, state, key, images, target):
        def objective(p):
            return loss(module.apply({"params": p}, augment(key, normalise(images))), target)

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    running = None
    for i in range(num_steps):
        params, state, value = step(params, state, jax.random.fold_in(key, i), *sample(i))
        running = float(value) if running is None else 0.98 * running + 0.02 * float(value)
        if (i + 1) % 200 == 0:
            log(f"step {i + 1}/{num_steps}  loss {running:.4f}")
    return params


def make(vocabulary):
    """The module for a vocabulary."""
    v = vocabulary
    return Checker(len(v.concepts), len(v.styles), len(v.backgrounds))


def save(directory, params, vocabulary, info):
    """Writes `model.safetensors` (bfloat16) and `config.json` (vocabulary, training facts)."""
    from safetensors.flax import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = {k: v.astype(jnp.bfloat16) for k, v in tree.flatten(params).items()}
    save_file(flat, str(directory / "model.safetensors"))
    config = dataclasses.asdict(vocabulary) | {"info": info}
    write_json(directory / "config.json", config, sort_keys=False)


def load(directory):
    """(params float32, Vocabulary) of a fitted checker.

    Raises:
        CheckpointError: no checker there, or its arrays do not fit its vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    directory = Path(directory)
    fix = "fit it with `python -m eval.metrics.scene_accuracy --fit`"
    try:
        config = json.loads((directory / "config.json").read_text())
        vocabulary = Vocabulary(*(tuple(config[k]) for k in ("concepts", "styles", "backgrounds")))
        flat = load_file(str(directory / "model.safetensors"))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no usable scene checker: {error}", directory, fix) from None
    params = tree.unflatten({k: v.astype(jnp.float32) for k, v in flat.items()})
    shapes = jax.eval_shape(make(vocabulary).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    expected = {k: v.shape for k, v in tree.flatten(shapes["params"]).items()}
    if expected != {k: v.shape for k, v in tree.flatten(params).items()}:
        raise CheckpointError("the scene checker's arrays do not fit its config", directory, fix)
    return params, vocabulary


def reader(params, vocabulary, batch_size=32, threshold=THRESHOLD):
    """`read(images uint8 [N,H,W,3]) -> (list of detections an image, background words)`."""
    module = make(vocabulary)
    apply = jax.jit(lambda p, x: module.apply({"params": p}, normalise(x)))

    def read(images):
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
            raise DataError(
                f"expected uint8 images [N, H, W, 3], got {images.dtype} {images.shape}",
                "scene checker",
            )
        found, backgrounds = [], []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), 0)])
            outputs = jax.tree.map(lambda v: np.asarray(v)[: len(batch)], apply(params, padded))  # noqa: B023
            found += detect(outputs, vocabulary, threshold)
            picks = outputs["background"].argmax(-1)
            backgrounds += [vocabulary.backgrounds[i] for i in picks]
        return found, backgrounds

    return read
