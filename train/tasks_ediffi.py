"""The tasks of eDiff-I (arXiv 2211.01324): `stage` trains one denoiser of the cascade.

The base on all noise levels (the shared model), an expert branched off it (`parent`), several
experts side by side, or a super-resolution stage: what differs is which keys the config has.
`train.ediffi_finish` joins the results.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.data.text import load_tokenizer, tokenize
from cnxs_jax.diffusion import edm, expert_tree, sampling
from cnxs_jax.diffusion.expert_tree import Interval, LogNormal
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.conditioning import Encoders, clip_pixels, dropped
from cnxs_jax.models.pixel_unet import PixelUNet
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.cascade import FILES, SOLVERS, Sampler, Stage
from cnxs_jax.pipelines.load import load_model, save_model
from train import inputs, validate
from train.loop import Task
from train.objectives_edm import ENCODER_MASKS, edm_denoise
from train.parts import fields, from_signed, make, stacked, to_signed


def tree(value, where):
    """`((level, index), ...)`, nodes of the expert tree that do not overlap."""
    if not validate.sequence(value):
        raise ConfigError(f"{value!r} is not a tuple of nodes", where, "write ((level, index),)")
    for node in value:
        validate.integers(2, low=0)(node, where)
    expert_tree.cover(value)


def shares(value, where):
    """One positive number an expert: how often its noise levels are drawn."""
    validate.numbers(len(value) if validate.sequence(value) else 0)(value, where)
    for number in value:
        validate.number(0, open_low=True)(number, where)


def margin(value, where):
    """A share of an expert's own levels, one for all experts or one for each."""
    for number in value if validate.sequence(value) else (value,):
        validate.number(0, 1)(number, where)


SHARE = validate.Optional(validate.number(0, 1))
POSITIVE = validate.number(0, open_low=True)
KEYS = {
    "stage": {
        "data": inputs.KEYS,
        "size": validate.integer(4),
        "low_res_size": validate.Optional(validate.integer(2)),
        "crop": validate.Optional(validate.integer(4)),
        "unet": fields(PixelUNet),
        "text_path": validate.Optional(validate.text),
        "clip_path": validate.Optional(validate.text),
        "parent": validate.Optional(validate.text),
        "tree": validate.Optional(tree),
        "expert": validate.Optional(validate.integer(0)),
        "mix": validate.Optional(shares),
        "margin": validate.Optional(margin),
        "levels": {"mean": validate.number(), "std": POSITIVE, "scale": POSITIVE},
        "objective": {
            "noises": validate.Optional(validate.integer(1)),
            "max_low_res_noise": validate.Optional(validate.number(0)),
            "dropout": dict.fromkeys(ENCODER_MASKS, SHARE),
        },
        "sampler": {
            "solver": validate.choice(*SOLVERS),
            "steps": validate.integer(1, 1000),
            "order": validate.Optional(validate.integer(1, 3)),
            "sigma_min": POSITIVE,
            "sigma_max": POSITIVE,
            "rho": POSITIVE,
            "guidance_scale": validate.number(0),
            "threshold": SHARE,
            "noise_level": validate.Optional(validate.number(0)),
        },
    }
}


def check_stage(values, where):
    size, low, crop = values["size"], values.get("low_res_size"), values.get("crop")
    if values["data"]["size"] % size or (low and size % low):
        raise ConfigError(
            f"pictures of {values['data']['size']} px, this stage {size}, its input {low}",
            f"{where}.size",
            "each must divide the one before it",
        )
    if crop and (not low or crop > size or crop % (size // low)):
        raise ConfigError(
            f"{crop} px of {size} px pictures do not cover whole pixels of {low} px ones",
            f"{where}.crop",
            "only super-resolution stages are trained on crops",
        )
    if bool(low) != bool(values["unet"].get("low_res_channels")):
        raise ConfigError(
            "low_res_size and unet.low_res_channels belong together", f"{where}.low_res_size"
        )
    count = len(expert_tree.cover(values.get("tree") or ()))
    expert, mix = values.get("expert"), values.get("mix")
    if expert is not None and (expert >= count or mix is not None):
        raise ConfigError(f"expert {expert} of {count}, mix {mix}", f"{where}.expert")
    if mix is not None and len(mix) != count:
        raise ConfigError(f"{len(mix)} shares for {count} experts", f"{where}.mix")
    margins = values.get("margin")
    if validate.sequence(margins) and len(margins) not in (1, count):
        raise ConfigError(
            f"{len(margins)} margins for {count} experts",
            f"{where}.margin",
            "give one number for all of them or one for each",
        )
    if values.get("parent") and values.get("ema_warmup"):
        what = "the warm-up would forget the average that the parent hands on"
        raise ConfigError(what, f"{where}.ema_warmup", "set it to False")
    try:
        Sampler(**values["sampler"]).table()
    except ConfigError as error:
        raise ConfigError(error.what, f"{where}.sampler", error.fix) from None


CONFLICTS = {"stage": check_stage}


def stage(config):
    """Trains a `PixelUNet`; exports it as an expert, ready for `train.ediffi_finish`.

    With `tree` and `expert`, it is trained on that expert's noise levels; with `tree` alone, all
    experts of it are trained side by side, each on an equal share of the batch; with `tree` and
    `mix`, it is one model that draws each expert's levels so often (a control for the experts).
    `margin` widens the levels of each.
    """
    encoders, encoder_params, loader = open_encoders(config)
    unet, levels = make(PixelUNet, config.unet), LogNormal(**config.levels)
    encoders.check(unet, "config.unet")
    intervals, mix = expert_tree.cover(config.get("tree") or ()), config.get("mix")
    limits = widened(intervals, config.get("margin") or 0.0)
    if mix is not None:
        wide = tuple(Interval(*limit) for limit in limits)
        levels, intervals = expert_tree.Mixture(levels, wide, tuple(mix)), intervals[:1]
    several = config.get("expert") is None and len(intervals) > 1
    own = limits if several else limits[config.get("expert") or 0]
    frozen = {"interval": np.array(own, np.float32)}
    encode = encoder(config, encoders)

    # Shapes alone: the encoders' weights must not become constants of the program below.
    shapes = jax.eval_shape(encode, encoder_params, one_example(loader), jax.random.key(0))

    def init(key):
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return unet.init(key, batch["x"], jnp.zeros(1), batch["cond"])["params"]

    options = dict(config.objective)
    rates = options.pop("dropout")
    there = {k: v for k, v in rates.items() if v and getattr(encoders, k) is not None}
    objective = edm_denoise(
        sampling.denoiser(unet), levels, interval=None, dropout=there, **options
    )

    def export(ema, frozen, encoders, path):
        for i in range(len(intervals) if several else 1):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], ema) if several else ema
            save_model(unet, own, path / f"expert_{i}")

    whole = not several and len(intervals) == 1
    return Task(
        objective,
        init,
        loader,
        encode,
        encoder_params,
        frozen,
        sample=sampler(config, encoders, unet, loader) if whole else None,
        export=export,
        parent=config.get("parent"),
        experts=len(intervals) if several else None,
    )


def widened(intervals, margins):
    """`(low, high)` of each interval with its margin: `margins` is one number, or one for each."""
    each = list(margins) if isinstance(margins, tuple | list) else [margins]
    each = each * len(intervals) if len(each) == 1 else each
    return [one.with_margin(margin) for one, margin in zip(intervals, each, strict=True)]


def open_encoders(config):
    """`(Encoders, their parameters, batches)`: the frozen encoders and a loader with their tokens.

    `text_path` has a T5 as `text_encoder` and `tokenizer` (any PixArt pipeline has), `clip_path` a
    CLIP as `clip_text_encoder`, `clip_tokenizer` and `clip_image_encoder`.
    """
    networks, params, tokenizers = {}, {}, {}
    for name, (network, tokens) in FILES.items():
        path = config.get("text_path" if name == "text" else "clip_path")
        if not path:
            continue
        networks[name], params[name] = load_model(f"{path}/{network}")
        if tokens:
            tokenizers[name] = load_tokenizer(f"{path}/{tokens}")
    lengths = {n: min(config.data.max_length, reach(networks[n])) for n in tokenizers}
    loader, _ = inputs.open_loader(config, tokens=False)
    return Encoders(**networks), params, Batches(loader, tokenizers, lengths)


def reach(module):
    """How many tokens a text encoder has positions for; T5 has no limit."""
    return getattr(module, "max_position_embeddings", 2**15)


class Batches:
    """A loader whose batches have the tokens of the text encoders that are there.

    Attributes:
        tokenizers, lengths: {"text" | "clip_text": tokenizer, or tokens that a text is padded to}.
    """

    def __init__(self, loader, tokenizers, lengths):
        self.loader, self.tokenizers, self.lengths = loader, tokenizers, lengths
        self.get_state, self.set_state = loader.get_state, loader.set_state

    def __next__(self):
        return self.of(next(self.loader))

    def of(self, batch):
        """The arrays of `batch` with the tokens of its captions."""
        found = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
        for name, tokenizer in self.tokenizers.items():
            ids, mask = tokenize(tokenizer, batch["caption"], self.lengths[name])
            prefix = "clip_" if name == "clip_text" else ""
            found |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        return found


def one_example(loader):
    """Zeros of the shapes of a batch of one."""
    state = loader.get_state()
    first = next(loader)
    loader.set_state(state)
    return {k: np.zeros((1, *v.shape[1:]), v.dtype) for k, v in first.items()}


def encoder(config, encoders):
    """`encode(params, raw, key) -> {"x", "cond"}` of uint8 pictures and tokens."""
    size, low, crop = config.size, config.get("low_res_size"), config.get("crop")

    def encode(params, raw, key):
        pictures = to_signed(raw["image"])
        own = dict(raw)
        if encoders.clip_image is not None:
            own["clip_pixels"] = clip_pixels(pictures * 0.5 + 0.5, encoders.clip_image.image_size)
        cond, x = encoders(params, own), shrunk(pictures, size)
        if low:
            cond["low_res"] = shrunk(pictures, low)
        if crop:
            x, cond["low_res"] = cropped(x, cond["low_res"], crop, key)
        return {"x": x, "cond": cond}

    return encode


def shrunk(pictures, size):
    """Pictures [B,H,W,3] at `size` px: means over squares of pixels."""
    batch, side = pictures.shape[0], pictures.shape[1]
    squares = pictures.reshape(batch, size, side // size, size, side // size, -1)
    return squares.mean((2, 4))


def cropped(x, low_res, crop, key):
    """The same random square of both, `crop` px of `x`, at whole pixels of `low_res`."""
    factor = x.shape[1] // low_res.shape[1]
    own = crop // factor

    def one(key, x, low_res):
        top, left = jax.random.randint(key, (2,), 0, low_res.shape[0] - own + 1)
        large = jax.lax.dynamic_slice(x, (top * factor, left * factor, 0), (crop, crop, 3))
        return large, jax.lax.dynamic_slice(low_res, (top, left, 0), (own, own, 3))

    return jax.vmap(one)(jax.random.split(key, x.shape[0]), x, low_res)


def stage_of(config, components, intervals=(expert_tree.WHOLE,), name="base"):
    """The cascade's `Stage` that a config describes."""
    levels, how = LogNormal(**config.levels), Sampler(**config.sampler)
    return Stage(name, config.size, tuple(components), tuple(intervals), levels, how)


def sampler(config, encoders, unet, loader):
    """`sample(ema, frozen, encoders)`: real pictures above drawn ones, never cropped."""
    encode = encoder(type(config)(config.to_dict() | {"crop": None}), encoders)
    examples = inputs.shown(config)
    shown, number = loader.of(examples), len(examples["caption"])

    @jax.jit
    def prepared(params, raw):
        batch = encode(params, raw, jax.random.key(0))
        cond = {k: v for k, v in batch["cond"].items() if not k.startswith("clip_image")}
        scale = jnp.full((number,), config.sampler.guidance_scale)
        cond = {**cond, "null": dropped(cond), "guidance_scale": scale}
        if "low_res" in cond:
            noise = jax.random.normal(jax.random.key(2), cond["low_res"].shape)
            level = jnp.full((number,), config.sampler.get("noise_level") or 0.0)
            cond = edm.augment_low_res(cond, level, noise)
        return batch["x"], cond

    def sample(ema, frozen, params):
        real, cond = prepared(params, shown)
        noise = jax.random.normal(jax.random.key(1), real.shape)
        drawn = stage_of(config, [Component(unet, ema)]).draw(noise, cond)
        return stacked(from_signed(real), from_signed(drawn))

    return sample
