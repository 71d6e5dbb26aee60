"""The task `controller`: a ControlNet-Transformer on a frozen PixArt pipeline.

The control image is the scene's edge map or, with `detector = "hed"`, HED edges of any picture as
in PixArt-delta (arXiv 2401.05252, section 4), encoded by the pipeline's VAE. Only the adapter is
trained, saved and exported.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import control
from cnxs_jax.control import hed
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer, from_base
from cnxs_jax.control.hints import line_art, three_channels
from cnxs_jax.data.pipeline import WORLDS
from cnxs_jax.diffusion import guidance, sampling, solvers
from cnxs_jax.errors import ConfigError
from train import features, inputs, networks, objectives, validate
from train.loop import Task
from train.parts import REMAT, SCHEDULE, from_signed, noise_schedule, scheduler_config, tiles
from train.tasks import DENOISE, check_range

KEYS = {
    "controller": {
        "data": inputs.KEYS,
        "base_path": validate.text,
        "dtype": validate.Optional(validate.choice("float32", "bfloat16")),
        "remat": validate.Optional(REMAT),
        "control": {
            "num_layers": validate.integer(1),
            "order": validate.Optional(validate.choice("released", "paper", "unet")),
        },
        "detector": validate.Optional(validate.choice("hed")),
        "detector_path": validate.Optional(validate.text),
        "caption_dropout": validate.number(0, 1),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": DENOISE,
    }
}


def check(values, where):
    check_range(values, where)
    source = values["data"]["source"]
    if not values.get("detector") and source not in (*WORLDS, "features"):
        what = f"{source} has no exact edges, which only the scenes know"
        raise ConfigError(what, f"{where}.detector", 'set it to "hed"')
    if values.get("detector_path") and not values.get("detector"):
        raise ConfigError("weights of no detector", f"{where}.detector_path", "leave it out")


CONFLICTS = {"controller": check}


def edge_image(edges):
    """Edge map [B,H,W], bool or 0/1 -> uint8 picture [B,H,W,3], white on black."""
    return (255 * line_art(edges)).astype(jnp.uint8)


def hint_picture(networks, encoders, raw):
    """The control picture [B,H,W,3] in 0..255 of a raw batch."""
    if networks.detector is None:
        return edge_image(raw["edges"])
    edges = hed.detect(networks.detector, encoders["detector"], raw["image"])
    return 255.0 * three_channels(edges)


def controller(config):
    """Trains the copied blocks of a ControlNet-Transformer on the pipeline at `base_path`."""
    found = networks.opened(config, recipe(config))
    task, module = controlled(config, found.networks, found.empty)
    sample = None
    if not found.cached:
        sample = sampler(config, module, found.networks, task.encode, found.tokenizer)

    def export(ema, frozen, encoders, path):
        from cnxs_jax.pipelines.load import save_model

        save_model(module.control, ema, path / "controlnet")

    return task._replace(loader=found.loader, sample=sample, export=export)


def controlled(config, nets, empty):
    """`(Task, controlled module)` of `controller`: the step alone (`train.networks.Recipe`)."""
    dit, dtype = nets.dit, nets.dit.dtype
    adapter = ControlNetTransformer(
        num_attention_heads=dit.num_attention_heads,
        attention_head_dim=dit.attention_head_dim,
        **dict(config.control),
    )
    fresh = from_base(nets.dit_params, adapter.num_layers)  # float32: it is trained
    base = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), nets.dit_params)
    module, _ = control.attach(dit, base, adapter, fresh)

    def encode(encoders, raw, key):
        """Latents of picture and edges, and the encoded caption or, now and then, the empty one."""
        key_drop, key_x, key_hint = jax.random.split(key, 3)
        given = features.read(nets, encoders, raw, hint_picture)
        without = features.empty_text(nets, encoders, empty)
        cond = features.drop_text(given, without, config.caption_dropout, key_drop)
        cond["hint"] = features.latents(nets, given, key_hint, "hint_")
        x = features.latents(nets, given, key_x)
        return {"x": x, "cond": {**cond, **features.micro(nets, given)}}

    run, noise = sampling.denoiser(module), noise_schedule(config)
    objective = objectives.denoise(run, noise, objectives.controlled, **config.objective)
    encoders = features.encoders_of(nets, empty)
    return Task(objective, fresh, None, encode, encoders, {"base": base}), module


def recipe(config):
    """The `Recipe`: a detector draws the control picture of the picture alone."""
    arrays = ("image",) if config.get("detector") else ("image", "edges")
    return networks.Recipe("base_path", controlled, arrays, hint_picture)


RECIPES = {"controller": recipe}


def sampler(config, module, nets, encode, tokenizer):
    """`sample(ema, frozen, encoders)`: edge maps above the pictures that were drawn with them."""
    arrays, vae = recipe(config).arrays, nets.vae
    nets = nets.bare  # no weights in the function below
    shown = inputs.examples(config, 16, arrays)
    raw = {key: shown[key] for key in arrays} | inputs.tokens(config, tokenizer, shown["caption"])
    empty = inputs.tokens(config, tokenizer, [""] * 16)
    table = solvers.from_config(scheduler_config(config, "DPMSolverMultistepScheduler"), 20)
    scale = config.get("guidance_scale", 4.5)

    @jax.jit
    def draw(params, encoders, raw, empty):
        key = jax.random.key(0)
        batch = encode(encoders, raw, key)
        without = encode(encoders, {**raw, **empty}, key)["cond"]
        null = {name: without[name] for name in ("text", "text_mask")}
        weights = jnp.full(batch["x"].shape[:1], scale, jnp.float32)
        cond = {**batch["cond"], "null": null, "guidance_scale": weights}
        start = jax.random.normal(jax.random.key(1), batch["x"].shape)
        z = sampling.sample(guidance.cfg(sampling.denoiser(module)), params, start, cond, table)
        z = z / vae.scaling_factor + (vae.shift_factor or 0.0)
        pictures = vae.apply({"params": encoders["vae"]}, z, method="decode")
        return pictures, hint_picture(nets, encoders, raw)

    def sample(ema, frozen, encoders):
        params = objectives.controlled(ema, frozen)
        pictures, hints = draw(params, encoders, raw, empty)
        pictures, hints = from_signed(pictures), np.asarray(hints) / 255.0
        return tiles(np.concatenate([hints[:8], pictures[:8], hints[8:], pictures[8:]]))

    return sample
