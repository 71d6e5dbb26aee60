"""The task `controller`: a ControlNet-Transformer on a frozen PixArt pipeline.

The control image is the scene's edge map, encoded by the pipeline's VAE as PixArt-delta encodes
its HED maps (arXiv 2401.05252, section 4). Only the adapter is trained, saved and exported.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import control
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer, from_base
from cnxs_jax.control.hints import line_art
from cnxs_jax.diffusion import guidance, sampling, solvers
from train import inputs, objectives, validate
from train.loop import Task
from train.parts import (
    REMAT,
    SCHEDULE,
    check_fit,
    check_scheduler,
    from_signed,
    latents,
    noise_schedule,
    scheduler_config,
    sizes_of,
    tiles,
)
from train.tasks import DENOISE, check_range, drop_captions

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
        "caption_dropout": validate.number(0, 1),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": DENOISE,
    }
}
CONFLICTS = {"controller": check_range}
ARRAYS = ("image", "edges")


def edge_image(edges):
    """Edge map [B,H,W], bool or 0/1 -> uint8 picture [B,H,W,3], white on black."""
    return (255 * line_art(edges)).astype(jnp.uint8)


def controller(config):
    """Trains the copied blocks of a ControlNet-Transformer on the pipeline at `base_path`."""
    from cnxs_jax.pipelines.load import read_model

    path, dtype = config.base_path, jnp.dtype(config.get("dtype") or "float32")
    dit, base = read_model(f"{path}/transformer")
    dit = dit.clone(dtype=dtype, remat=config.get("remat"))
    vae, vae_params = read_model(f"{path}/vae")
    text, text_params = read_model(f"{path}/text_encoder", dtype=dtype)
    loader, tokenizer = inputs.open_loader(config, tokenizer_path=f"{path}/tokenizer", keys=ARRAYS)
    check_scheduler(config, path)
    check_fit(dit, vae, text, config.data.size)
    empty = inputs.tokens(config, tokenizer, [""])
    encoders = {"vae": vae_params, "text_encoder": text_params}
    adapter = ControlNetTransformer(
        num_attention_heads=dit.num_attention_heads,
        attention_head_dim=dit.attention_head_dim,
        **dict(config.control),
    )
    fresh = from_base(base, adapter.num_layers)  # float32: it is trained
    base = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), base)
    module, _ = control.attach(dit, base, adapter, fresh)

    def encode(encoders, raw, key):
        """Latents of picture and edges, and the encoded caption or, now and then, the empty one."""
        key_drop, key_x, key_hint = jax.random.split(key, 3)
        tokens = drop_captions(raw, empty, config.caption_dropout, key_drop)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        cond = {
            "text": text.apply({"params": encoders["text_encoder"]}, ids, mask),
            "text_mask": mask,
            "hint": latents(vae, encoders["vae"], edge_image(raw["edges"]), key_hint),
        }
        x = latents(vae, encoders["vae"], raw["image"], key_x)
        return {"x": x, "cond": {**cond, **sizes_of(dit, raw)}}

    run, noise = sampling.denoiser(module), noise_schedule(config)
    objective = objectives.denoise(run, noise, objectives.controlled, **config.objective)
    sample = sampler(config, module, vae, encode, tokenizer)

    def export(ema, frozen, encoders, path):
        from cnxs_jax.pipelines.load import save_model

        save_model(module.control, ema, path / "controlnet")

    return Task(objective, fresh, loader, encode, encoders, {"base": base}, sample, export)


def sampler(config, module, vae, encode, tokenizer):
    """`sample(ema, frozen, encoders)`: edge maps above the pictures that were drawn with them."""
    shown = inputs.examples(config, 16, ARRAYS)
    raw = {key: shown[key] for key in ARRAYS} | inputs.tokens(config, tokenizer, shown["caption"])
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
        return vae.apply({"params": encoders["vae"]}, z, method="decode")

    def sample(ema, frozen, encoders):
        params = objectives.controlled(ema, frozen)
        pictures = from_signed(draw(params, encoders, raw, empty))
        hints = np.asarray(edge_image(jnp.asarray(raw["edges"]))) / 255.0
        return tiles(np.concatenate([hints[:8], pictures[:8], hints[8:], pictures[8:]]))

    return sample
