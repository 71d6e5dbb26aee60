"""The tasks of Stable Diffusion's UNets: `base`, and `controller`, ControlNet-XS on a frozen one.

`base` trains a UNet and its text encoder from nothing on the latents of a given VAE. `controller`
trains an adapter, the only thing with gradients, an optimizer and an average: the base is
`frozen`, an argument of the step. With `control.kind` "controlnet" the same recipe trains the
original ControlNet (arXiv 2302.05543) instead, as the baseline.
"""

import math

import jax
import jax.numpy as jnp

from cnxs_jax import control
from cnxs_jax import tree as trees
from cnxs_jax.control import controlnet, controlnet_xs
from cnxs_jax.control.controlled_unet import COMPAT
from cnxs_jax.control.xs_sizes import INFUSIONS, TYPES
from cnxs_jax.convert import examples
from cnxs_jax.data import text as texts
from cnxs_jax.diffusion import sampling
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.clip import CLIPTextModel
from cnxs_jax.models.unet import UNet, latent_sides
from train import inputs, layout, networks, networks_unet, objectives, validate
from train.loop import Task
from train.parts import (
    REMAT,
    SCHEDULE,
    check_scheduler,
    check_tokenizer,
    fields,
    latents,
    make,
    noise_schedule,
    outputs,
    scheduler_config,
    stacked,
    with_text_encoder,
)
from train.tasks import DENOISE, check_range, frozen_part, start_from

OBJECTIVE = {name: rule for name, rule in DENOISE.items() if name != "learned_range"}
XS = {
    "size_ratio": validate.Optional(validate.number(0, 1, open_low=True)),
    "block_out_channels": validate.Optional(validate.integers()),
    "head_channels": validate.Optional(validate.integer(1)),
    "control_type": validate.Optional(validate.choice(*TYPES)),
    "infusion": validate.Optional(validate.choice(*INFUSIONS)),
    "learn_time_embedding": validate.Optional(validate.boolean),
    "time_embedding_mix": validate.Optional(validate.number(0, 1)),
}
KEYS = {
    "base": {
        "data": inputs.KEYS,
        "vae_path": validate.text,
        "init_path": validate.Optional(validate.text),
        "unet": fields(UNet),
        "text_encoder": fields(CLIPTextModel),
        "caption_dropout": validate.number(0, 1),
        "layout": validate.Optional(validate.number(0)),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": OBJECTIVE,
    },
    "controller": {
        "data": inputs.KEYS | inputs.HINT,
        "base_path": validate.text,
        "dtype": validate.Optional(validate.choice("float32", "bfloat16")),
        "remat": validate.Optional(REMAT),
        "control": {
            "kind": validate.choice("controlnet_xs", "controlnet"),
            "conditioning_embedding_out_channels": validate.Optional(validate.integers()),
            "compat": validate.Optional(validate.choice(*COMPAT)),
            **XS,
        },
        "caption_dropout": validate.number(0, 1),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": OBJECTIVE,
    },
}
ARRAYS = ("image", "hint")
SCHEDULER = "DPMSolverMultistepScheduler"
STEPS = 20  # of the pictures that a run draws
# The last layers of the residual branches, which start at zero as in LDM (arXiv 2112.10752).
LAST = (
    r".*resnets_\d+/conv2/kernel",
    r".*attentions_\d+/proj_out/kernel",
    r"conv_out/kernel",
)


def check_base(values, where):
    check_range(values, where)
    check_pictures(values["data"], f"{where}.data")
    if not values["data"].get("tokenizer"):
        raise ConfigError("the key 'tokenizer' is missing", f"{where}.data.tokenizer")
    layout.check(values, where)


def check_controller(values, where):
    check_range(values, where)
    if values.get("freeze"):
        raise ConfigError("the whole base is frozen as it is", f"{where}.freeze", "leave it out")
    data, own = values["data"], values["control"]
    check_pictures(data, f"{where}.data")
    inputs.check_hint(data, f"{where}.data")
    sizes = [name for name in ("size_ratio", "block_out_channels") if own.get(name)]
    if own["kind"] == "controlnet_xs" and len(sizes) != 1:
        raise ConfigError(
            "give either size_ratio or block_out_channels, the size of a ControlNet-XS",
            f"{where}.control.size_ratio",
        )
    mix = own.get("time_embedding_mix")
    if mix is not None and mix < 1.0 and not own.get("learn_time_embedding"):
        raise ConfigError(
            "a mix below 1 needs an embedding to mix in",
            f"{where}.control.time_embedding_mix",
            "set control.learn_time_embedding = True",
        )
    if own["kind"] == "controlnet" and own.get("compat") not in (None, "official"):
        raise ConfigError("ControlNet knows only 'official'", f"{where}.control.compat")


def check_pictures(data, where):
    """These tasks read pictures of one size."""
    if data["source"] == "features":
        fix = "give it the data that the features were made of"
        raise ConfigError("this task reads pictures, not cached features", f"{where}.source", fix)
    if data.get("buckets"):
        what = "this task reads pictures of one size"
        raise ConfigError(what, f"{where}.buckets", "set it to False")


CONFLICTS = {"base": check_base, "controller": check_controller}


# --- the base --------------------------------------------------------------------------------


def base(config):
    """Trains a UNet and its CLIP text encoder; exports a StableDiffusionPipeline.

    With `init_path`, a pipeline directory, they start as that pipeline's; with `layout` the UNet's
    features learn what stands where (`train.layout`).
    """
    from cnxs_jax.pipelines.load import read_model

    unet, text = make(UNet, config.unet), make(CLIPTextModel, config.text_encoder)
    vae, vae_params = read_model(config.vae_path)
    terms = {"layout": config.layout} if config.get("layout") else {}
    arrays = ("image", "concept_map") if terms else ("image",)
    loader, tokenizer = inputs.open_loader(config, keys=arrays, tokenize=texts.tokenize)
    check_tokenizer(tokenizer, text)
    check_base_sizes(config, unet, vae, text, tokenizer)
    empty = inputs.tokens(config, tokenizer, [""], texts.tokenize)["input_ids"]

    def encode(encoders, raw, key):
        key_drop, key_vae = jax.random.split(key)
        drop = jax.random.bernoulli(key_drop, config.caption_dropout, (len(raw["input_ids"]), 1))
        ids = jnp.where(drop, empty, raw["input_ids"])
        x, cond = latents(vae, encoders["vae"], raw["image"], key_vae), {"input_ids": ids}
        if terms:
            cond["coverage"] = layout.coverage(raw["concept_map"], grid, concepts)
        return {"x": x, "cond": cond}

    def init(key):
        key_unet, key_text = jax.random.split(key)
        params = unet.init(key_unet, *examples.unet_example(unet))["params"]
        ids = examples.clip_text_example(text)
        return {"unet": zeroed(params), "text_encoder": text.init(key_text, *ids)["params"]}

    if config.get("init_path"):
        init = start_from(config.init_path, init, ("unet", "text_encoder"))
    run = sampling.denoiser(unet)
    if terms:
        run, concepts = layout.tapped_unet(unet), len(inputs.world(config).concepts)
        _, t, cond = examples.unet_example(unet)
        example = jnp.zeros((1, *latent_sides(unet.sample_size), unet.in_channels)), t, cond
        shapes = jax.eval_shape(unet.init, jax.random.key(0), *example)["params"]
        _, patches, features = jax.eval_shape(run, shapes, *example)[1].shape
        grid = (math.isqrt(patches),) * 2
        init = layout.with_head(init, features, concepts)

    def components(params, encoders):
        return {
            "unet": (unet, params["unet"]),
            "vae": (vae, encoders["vae"]),
            "text_encoder": (text, params["text_encoder"]),
        }

    frozen, resolve, init = frozen_part(config, init)
    scheduler = scheduler_config(config, SCHEDULER)
    sample, export = outputs(
        config, components, tokenizer, scheduler, drawing(config), resolve,
        family="StableDiffusionPipeline",
    )  # fmt: skip

    def denoise(params, x, t, cond):
        out = run(params["unet"], x, t, cond)
        if not terms:
            return out
        out, tokens = out
        return out, {"layout": layout.loss(params[layout.NAME], tokens, cond["coverage"])}

    def encode_text(params, cond):
        return {"text": text.apply({"params": params}, cond["input_ids"])["last"]}

    joint, noise = with_text_encoder(denoise, encode_text), noise_schedule(config)
    objective = objectives.denoise(joint, noise, resolve, terms=terms, **config.objective)
    return Task(objective, init, loader, encode, {"vae": vae_params}, frozen, sample, export)


def zeroed(params):
    """Parameters of a UNet with the layers of `LAST` at zero."""
    return trees.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if trees.matches(LAST, path) else leaf, params
    )


def drawing(config):
    """How the pictures of a run are drawn."""
    return {"num_inference_steps": STEPS, "guidance_scale": config.get("guidance_scale")}


def check_base_sizes(config, unet, vae, text, tokenizer):
    """Raises ConfigError unless networks, tokenizer and pictures fit each other."""
    networks_unet.check_fit(unet, vae, text.hidden_size, config.data.size)
    check_length(config, tokenizer, text)
    latent = config.data.size // vae.downsample_factor
    if latent_sides(unet.sample_size) != (latent, latent):
        raise ConfigError(
            f"sample_size {unet.sample_size}, {config.data.size} px give latents of {latent}",
            "config.unet.sample_size",
        )


def check_length(config, tokenizer, text):
    """Raises ConfigError unless texts have the length here that the pipeline gives them."""
    expected, given = networks_unet.max_tokens(tokenizer, text), inputs.max_length(config)
    if given != expected:
        what = f"max_length {given}, the pipeline pads texts to {expected}"
        raise ConfigError(what, "config.data.max_length", f"set it to {expected}")


# --- the controller --------------------------------------------------------------------------


def controller(config):
    """Trains a controller on the pipeline at `base_path` and exports it in diffusers' layout."""
    nets, tokenizers, loader, empty = opened(config, config.base_path, ARRAYS)
    task, module = controlled(config, nets, empty)
    sample = sampler(config, module, nets.bare, tokenizers)

    def export(ema, frozen, encoders, target):
        from cnxs_jax.pipelines.load import save_model

        save_model(module.control, ema, target / "controlnet")

    return task._replace(loader=loader, sample=sample, export=export)


def opened(config, path, keys=("image",)):
    """The pipeline at `path`, checked against the config, and the data as it reads them.

    Returns `(networks, tokenizers, loader of the arrays `keys`, ids of the empty prompt)`.
    """
    nets = networks_unet.load(config, path)
    names = ("tokenizer", "tokenizer_2")[: len(nets.texts)]
    tokenizers = tuple(texts.load_tokenizer(f"{path}/{name}") for name in names)
    check_scheduler(config, path)
    check_length(config, tokenizers[0], nets.texts[0][0])
    width = sum(module.hidden_size for module, _ in nets.texts)
    networks_unet.check_fit(nets.unet, nets.vae, width, config.data.size)
    tokenize = networks_unet.tokenizing(tokenizers)
    options = {"tokenizer_path": f"{path}/tokenizer", "keys": keys, "tokenize": tokenize}
    loader, tokenizer = inputs.open_loader(config, **options)
    return nets, tokenizers, loader, inputs.tokens(config, tokenizer, [""], tokenize)


def controlled(config, nets, empty):
    """`(Task, controlled module)` of `controller`: the step alone (`train.networks.Recipe`)."""
    adapter, fresh = new_adapter(config, nets)  # float32: it is trained
    dtype, compat = nets.unet.dtype, config.control.get("compat") or "official"
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), nets.unet_params)
    module, _ = control.attach(nets.unet, frozen, adapter, fresh, compat)
    if module.hint_factor != nets.vae.downsample_factor:
        raise ConfigError(
            f"control pictures of {module.hint_factor} pixels a latent, the VAE has "
            f"{nets.vae.downsample_factor}",
            "config.control.conditioning_embedding_out_channels",
            "give one number more than the VAE halves pictures",
        )

    encoders, nets = nets.encoders, nets.bare  # the functions below keep no second base

    def encode(encoders, raw, key):
        """Latents, the control picture in [0, 1], and the caption or, now and then, none."""
        key_drop, key_x = jax.random.split(key)
        cond = networks_unet.condition(nets, encoders, raw, empty, config.caption_dropout, key_drop)
        x = latents(nets.vae, encoders["vae"], raw["image"], key_x)
        return {"x": x, "cond": {**cond, "hint": raw["hint"].astype(jnp.float32) / 255.0}}

    run, noise = sampling.denoiser(module), noise_schedule(config)
    objective = objectives.denoise(run, noise, objectives.controlled, **config.objective)
    return Task(objective, fresh, None, encode, encoders, {"base": frozen}), module


def new_adapter(config, nets):
    """`(module, parameters)` of a fresh controller for the base; parameters may be a function.

    ControlNet's start as a copy of the base's encoder; ControlNet-XS copies nothing.
    """
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in config.control.items()}
    own = {k: v for k, v in own.items() if v is not None and k not in ("kind", "compat")}
    if config.control.kind == "controlnet":
        own = {k: v for k, v in own.items() if k not in XS}
        adapter = controlnet.from_unet(nets.unet, **own)
        key = jax.random.key(config.seed)
        return adapter, controlnet.copied_params(adapter, nets.unet_params, key)
    adapter = controlnet_xs.from_unet(nets.unet, **own)
    return adapter, lambda key: controlnet_xs.fresh_params(adapter, key)


RECIPES = {
    "controller": networks.Recipe(
        "base_path", controlled, ARRAYS, zeros=networks_unet.zeros, cacheable=False
    )
}


def sampler(config, module, nets, tokenizers):
    """`sample(ema, frozen, encoders)`: control pictures, what was drawn with them, the scenes."""
    shown = inputs.shown(config, ARRAYS)
    family = "StableDiffusionXLPipeline" if len(tokenizers) > 1 else "StableDiffusionPipeline"
    tokenizer = tokenizers if len(tokenizers) > 1 else tokenizers[0]
    scheduler = scheduler_config(config, SCHEDULER)

    def sample(ema, frozen, encoders):
        from cnxs_jax.pipelines.base import Component
        from cnxs_jax.pipelines.control import Controller
        from cnxs_jax.pipelines.pipeline import FAMILIES

        parts = {"unet": Component(nets.unet, frozen["base"])}
        parts["vae"] = Component(nets.vae, encoders["vae"])
        for name, (text, _) in zip(networks_unet.TEXTS, nets.texts, strict=False):
            parts[name] = Component(text, encoders[name])
        pipe = FAMILIES[family](
            parts, tokenizer, scheduler, options={networks_unet.ZEROS: nets.zero_null},
            controllers=(Controller(module.control, ema, module.compat),),
        )  # fmt: skip
        options = {"image": shown["hint"], "output_type": "np", **drawing(config)}
        drawn = pipe(shown["caption"], seed=0, **options).images
        return stacked(shown["hint"] / 255.0, drawn, shown["image"] / 255.0)

    return sample
