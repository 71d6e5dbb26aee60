"""The task `controller`: a ControlNet-Transformer on a frozen PixArt pipeline.

The control picture (`data.hint`: a scene's exact edges, Canny of any picture, ...) is encoded by
the pipeline's VAE as PixArt-delta encodes its HED maps (arXiv 2401.05252, section 4). Only the
adapter is trained, saved and exported.
"""

import jax
import jax.numpy as jnp

from cnxs_jax import control
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer, from_base
from cnxs_jax.diffusion import guidance, sampling, solvers
from train import features, inputs, networks, objectives, validate
from train.loop import Task
from train.parts import REMAT, SCHEDULE, from_signed, noise_schedule, scheduler_config, stacked
from train.tasks import DENOISE, check_range

KEYS = {
    "controller": {
        "data": inputs.KEYS | inputs.HINT,
        "base_path": validate.text,
        "dtype": validate.Optional(validate.choice("float32", "bfloat16")),
        "remat": validate.Optional(REMAT),
        "control": {
            "num_layers": validate.integer(1),
            "order": validate.Optional(validate.choice("released", "paper", "unet")),
        },
        "caption_dropout": validate.number(0, 1),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": DENOISE,
    }
}
ARRAYS = ("image", "hint")


def check_controller(values, where):
    check_range(values, where)
    inputs.check_hint(values["data"], f"{where}.data")


CONFLICTS = {"controller": check_controller}


def hint_picture(raw):
    """The control picture of a raw batch, uint8 [B,H,W,3]."""
    return raw["hint"]


def controller(config):
    """Trains the copied blocks of a ControlNet-Transformer on the pipeline at `base_path`."""
    found = networks.opened(config, RECIPES["controller"])
    task, module = controlled(config, found.networks, found.empty)
    sample = None
    if not found.cached:
        sample = sampler(config, module, found.networks.vae, task.encode, found.tokenizer)

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


RECIPES = {"controller": networks.Recipe("base_path", controlled, ARRAYS, hint_picture)}


def sampler(config, module, vae, encode, tokenizer):
    """`sample(ema, frozen, encoders)`: control pictures, what was drawn with them, the scenes."""
    shown = inputs.shown(config, ARRAYS)
    raw = {key: shown[key] for key in ARRAYS} | inputs.tokens(config, tokenizer, shown["caption"])
    empty = inputs.tokens(config, tokenizer, [""] * len(shown["caption"]))
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
        return vae.apply({"params": encoders["vae"]}, z, method="decode")

    def sample(ema, frozen, encoders):
        params = objectives.controlled(ema, frozen)
        pictures = from_signed(draw(params, encoders, raw, empty))
        return stacked(raw["hint"] / 255.0, pictures, raw["image"] / 255.0)

    return sample
