"""The tasks of PixArt: `autoencoder`, `denoiser` (with its text encoder or without) and `distill`.

Each builder turns a config into a `train.loop.Task`; `KEYS` says which keys it reads, `CONFLICTS`
what cannot go together. Nothing here knows how to take a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree
from cnxs_jax.diffusion import sampling, schedule
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.models.vae import AutoencoderKL
from train import features, inputs, layout, networks, objectives, optimizer, validate, word_order
from train.loop import Task
from train.parts import (
    LORA,
    REMAT,
    SCHEDULE,
    check_fit,
    check_vocabulary,
    export_beside,
    fields,
    from_signed,
    latents,
    make,
    noise_schedule,
    outputs,
    scheduler_config,
    sizes_of,
    stacked,
    student_of,
    t5_text,
    to_signed,
    whole_mask,
    with_adapter_file,
    with_text_encoder,
)

PREDICTION = validate.choice(*schedule.PREDICTIONS)
DENOISE = {
    "prediction": PREDICTION,
    "loss_weighting": validate.Optional(validate.choice(*objectives.WEIGHTINGS)),
    "snr_gamma": validate.Optional(validate.number(0, open_low=True)),
    "learned_range": validate.Optional(validate.boolean),
    "t_range": validate.Optional(validate.integers(2, low=0)),
    "logit_normal": validate.Optional(validate.numbers(2)),
    "noises": validate.Optional(validate.integer(1)),
}
CONSISTENCY = {
    "prediction": PREDICTION,
    "omega": validate.number(0),
    "num_ddim_steps": validate.integer(1),
    "loss": validate.Optional(validate.choice(*objectives.LOSSES)),
    "huber_c": validate.Optional(validate.number(0, open_low=True)),
}
AUTOENCODE = {k: validate.Optional(validate.number(0)) for k in ("l2", "kl", "edge")}
KEYS = {
    "autoencoder": {
        "data": inputs.KEYS,
        "vae": validate.Optional(fields(AutoencoderKL)),
        "vae_path": validate.Optional(validate.text),
        "objective": AUTOENCODE,
    },
    "denoiser": {
        "data": inputs.KEYS,
        "vae_path": validate.text,
        "init_path": validate.Optional(validate.text),
        "transformer": fields(PixArt),
        "text_encoder": validate.Optional(fields(T5Encoder)),
        "text_encoder_path": validate.Optional(validate.text),
        "caption_dropout": validate.number(0, 1),
        "word_order": validate.Optional(validate.number(0)),
        "layout": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": DENOISE,
    },
    "distill": {
        "data": inputs.KEYS,
        "teacher_path": validate.text,
        "dtype": validate.Optional(validate.choice("float32", "bfloat16")),
        "remat": validate.Optional(REMAT),
        "null": validate.choice("learned", "empty_prompt"),
        "schedule": SCHEDULE,
        "objective": CONSISTENCY,
        "lora": validate.Optional(LORA),
    },
}


def check_autoencoder(values, where):
    if (values.get("vae") is None) == (values.get("vae_path") is None):
        raise ConfigError(
            "give vae (a new one) or vae_path (one to train on), one of them", f"{where}.vae"
        )


def check_denoiser(values, where):
    dit, size = values["transformer"], values["data"]["size"]
    patch, latent = dit.get("patch_size", 2), dit.get("sample_size", 128)
    if size % latent or latent % patch:
        raise ConfigError(
            f"pictures of {size} px do not give latents of {latent} in patches of {patch}",
            f"{where}.data.size",
            f"the nearest are {validate.nearest(size, latent)}",
        )
    if (values.get("text_encoder") is None) == (values.get("text_encoder_path") is None):
        raise ConfigError(
            "give text_encoder (trained along) or text_encoder_path (frozen), one of them",
            f"{where}.text_encoder",
        )
    if values.get("word_order") and values.get("text_encoder") is None:
        raise ConfigError(
            "a frozen text encoder learns no word order", f"{where}.word_order", "leave it out"
        )
    layout.check(values, where)
    if not values["data"].get("tokenizer"):
        raise ConfigError("a denoiser needs a tokenizer", f"{where}.data.tokenizer", "name one")
    learned = values["objective"].get("learned_range")
    channels = dit.get("in_channels", 4) * (2 if learned else 1)
    if dit.get("out_channels", 8) < channels:
        raise ConfigError(
            f"out_channels {dit.get('out_channels', 8)}, expected {channels} "
            f"({'with' if learned else 'without'} learned_range)",
            f"{where}.transformer.out_channels",
        )
    check_range(values, where)


def check_range(values, where):
    steps, limits = values["schedule"]["num_steps"], values["objective"].get("t_range")
    if limits is not None and not 0 <= limits[0] < limits[1] <= steps:
        raise ConfigError(
            f"{tuple(limits)} is not inside [0, {steps})", f"{where}.objective.t_range"
        )


def check_distill(values, where):
    steps, parts = values["schedule"]["num_steps"], values["objective"]["num_ddim_steps"]
    if parts > steps or steps % parts:
        raise ConfigError(
            f"num_ddim_steps {parts} must divide the {steps} steps of the schedule",
            f"{where}.objective.num_ddim_steps",
        )
    if values.get("lora") and values.get("freeze"):
        raise ConfigError(
            "an adapter leaves the whole teacher frozen", f"{where}.freeze", "give lora or freeze"
        )


CONFLICTS = {
    "autoencoder": check_autoencoder,
    "denoiser": check_denoiser,
    "distill": check_distill,
}


# --- the autoencoder -------------------------------------------------------------------------


def autoencoder(config):
    """Trains an AutoencoderKL; exports it with the scaling factor that its latents need.

    With `vae_path` it trains that one on, whose scaling factor stays: denoisers know its latents.
    """
    from cnxs_jax.pipelines.load import read_model

    loader, _ = inputs.open_loader(config, tokens=False)
    side = config.data.size
    if config.get("vae_path"):
        vae, init = read_model(config.vae_path)
    else:
        vae = make(AutoencoderKL, config.vae)

        def init(key):
            return vae.init(key, jnp.zeros((1, side, side, vae.in_channels)))["params"]

    if side % vae.downsample_factor:
        near = validate.nearest(side, vae.downsample_factor)
        raise ConfigError(
            f"{side} px are not a multiple of {vae.downsample_factor}, the VAE's factor",
            "config.data.size",
            f"the nearest are {near}",
        )
    frozen, resolve, init = frozen_part(config, init)

    def apply(method):
        return lambda params, x: vae.apply({"params": params}, x, method=method)

    def encode(encoders, raw, key):
        return {"x": to_signed(raw["image"]), "cond": {}}

    reconstruct = jax.jit(lambda p, x: apply("decode")(p, apply("encode")(p, x)[0]))
    shown = inputs.shown(config)["image"]

    def sample(ema, frozen, encoders):
        again = reconstruct(resolve(ema, frozen), to_signed(jnp.asarray(shown)))
        return stacked(shown / 255.0, from_signed(again))

    def export(ema, frozen, encoders, path):
        from cnxs_jax.pipelines.load import save_model

        params, factor = resolve(ema, frozen), vae.scaling_factor
        if not config.get("vae_path"):
            shown = inputs.examples(config, 256)["image"]
            factor = scaling_factor(jax.jit(apply("encode")), params, shown)
        save_model(vae.clone(scaling_factor=factor), params, path / "vae")

    objective = objectives.autoencode(apply("encode"), apply("decode"), resolve, **config.objective)
    return Task(objective, init, loader, encode, frozen=frozen, sample=sample, export=export)


def scaling_factor(encode_fn, params, image, batch=64):
    """1 / standard deviation of the posterior's samples over uint8 pictures [N,H,W,3]."""
    parts = [
        encode_fn(params, to_signed(jnp.asarray(image[i : i + batch])))
        for i in range(0, len(image), batch)
    ]
    means = np.concatenate([np.asarray(mean, np.float64) for mean, _ in parts])
    noise = np.mean([np.exp(np.asarray(logvar, np.float64)).mean() for _, logvar in parts])
    return float(1.0 / np.sqrt(means.var() + noise))


# --- the denoiser ----------------------------------------------------------------------------


def with_losses(dit, terms):
    """The denoiser of a tree with its heads: its output, and the losses [B] of `terms` if any."""
    run = layout.tapped(dit) if "layout" in terms else sampling.denoiser(dit)

    def denoise(params, x, t, cond):
        out, losses = run(params["transformer"], x, t, cond), {}
        if "layout" in terms:
            out, tokens = out
            losses["layout"] = layout.loss(params[layout.NAME], tokens, cond["coverage"])
        if "word_order" in terms:
            seen = cond["text"], cond["input_ids"], cond["text_mask"]
            losses["word_order"] = word_order.loss(params[word_order.NAME], *seen)
        return (out, losses) if terms else out

    return denoise


def drop_captions(raw, empty, rate, key):
    """Ids and mask with a share `rate` of the captions replaced by the empty prompt's."""
    drop = jax.random.bernoulli(key, rate, (raw["input_ids"].shape[0], 1))
    return {k: jnp.where(drop, empty[k], raw[k]) for k in ("input_ids", "attention_mask")}


def denoiser(config):
    """Trains a PixArt transformer, and its text encoder with it unless `text_encoder_path`.

    With `init_path`, a pipeline directory, they start as that pipeline's; with `word_order` the
    text encoder learns its captions' order apart (`train.word_order`), with `layout` the picture
    tokens learn what stands where (`train.layout`).
    """
    from cnxs_jax.pipelines.load import read_model

    dit = make(PixArt, config.transformer)
    vae, vae_params = read_model(config.vae_path)
    joint = config.get("text_encoder") is not None
    terms = {name: config[name] for name in ("word_order", "layout") if config.get(name)}
    arrays = ("image", "concept_map") if "layout" in terms else ("image",)
    loader, tokenizer = inputs.open_loader(config, keys=arrays)
    empty = inputs.tokens(config, tokenizer, [""])
    encoders = {"vae": vae_params}
    if joint:
        text = make(T5Encoder, config.text_encoder)
        check_vocabulary(tokenizer, text)
        run = with_text_encoder(with_losses(dit, terms), functools.partial(t5_text, text))
    else:
        text, encoders["text_encoder"] = read_model(config.text_encoder_path)
        run = sampling.denoiser(dit)
    check_fit(dit, vae, text, config.data.size)
    latent = config.data.size // vae.downsample_factor
    if latent != dit.sample_size:
        raise ConfigError(
            f"sample_size {dit.sample_size}, {config.data.size} px give latents of {latent}",
            "config.transformer.sample_size",
        )

    def encode(encoders, raw, key):
        key_drop, key_vae = jax.random.split(key)
        cond = drop_captions(raw, empty, config.caption_dropout, key_drop)
        if not joint:
            cond = t5_text(text, encoders["text_encoder"], cond)
        x = latents(vae, encoders["vae"], raw["image"], key_vae)
        if "layout" in terms:
            grid = (dit.sample_size // dit.patch_size,) * 2
            cond["coverage"] = layout.coverage(raw["concept_map"], grid, concepts)
        return {"x": x, "cond": {**cond, **sizes_of(dit, raw)}}

    def init(key):
        key_dit, key_text = jax.random.split(key)
        side, length = dit.sample_size, inputs.max_length(config)
        cond = {
            "text": jnp.zeros((1, length, dit.caption_channels)),
            "text_mask": whole_mask(length),
        }
        cond |= sizes_of(dit, {"image": jnp.zeros((1, side, side, 3))})
        x = jnp.zeros((1, side, side, dit.in_channels))
        params = dit.init(key_dit, x, jnp.zeros((1,)), cond)["params"]
        if not joint:
            return params
        ids = jnp.ones((1, length), jnp.int32)
        text_params = text.init(key_text, ids, whole_mask(length))["params"]
        return {"text_encoder": text_params, "transformer": params}

    if config.get("init_path"):
        parts = ("text_encoder", "transformer") if joint else "transformer"
        init = start_from(config.init_path, init, parts)
    if "word_order" in terms:
        init = word_order.with_heads(init, text)
    if "layout" in terms:
        concepts = len(inputs.world(config).concepts)
        init = layout.with_head(init, dit.features, concepts)

    def components(params, encoders):
        both = params if joint else {**encoders, "transformer": params}
        return {
            "transformer": (dit, both["transformer"]),
            "vae": (vae, encoders["vae"]),
            "text_encoder": (text, both["text_encoder"]),
        }

    noise = noise_schedule(config)
    scheduler = scheduler_config(config, "DPMSolverMultistepScheduler")
    frozen, resolve, init = frozen_part(config, init)
    options = {"num_inference_steps": 20}
    sample, export = outputs(config, components, tokenizer, scheduler, options, resolve)
    objective = objectives.denoise(run, noise, resolve, terms=terms, **config.objective)
    return Task(objective, init, loader, encode, encoders, frozen, sample, export)


def start_from(path, init, parts):
    """Parameters of the pipeline at `path` in place of `init`'s, which they must be like.

    `parts`: the name of its only component, or the names of those that are trained together.
    """
    from cnxs_jax.pipelines.load import read_model

    together = (parts,) if isinstance(parts, str) else parts
    found = {part: read_model(path, part)[1] for part in together}
    found = found[parts] if isinstance(parts, str) else found
    wanted = tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    given = tree.flatten(found)
    for name in sorted(wanted.keys() | given.keys()):
        here, there = (flat[name].shape if name in flat else None for flat in (wanted, given))
        if here != there:
            what = f"{name} is {there} in {path}, the config makes it {here}"
            raise ConfigError(what, "config.init_path", "give that pipeline's own sizes")
    return found


def frozen_part(config, init):
    """`(frozen, resolve, params)` for `config.freeze`: the frozen leaves become an argument."""
    if not config.get("freeze"):
        return {}, objectives.identity, init
    params = jax.jit(init)(jax.random.key(config.seed)) if callable(init) else init
    trainable, rest = optimizer.freeze(params, tuple(config.freeze))
    return {"rest": rest}, objectives.with_frozen, trainable


# --- latent consistency distillation ---------------------------------------------------------


def distill(config):
    """Distils the pipeline at `teacher_path` into a student that starts as its copy.

    With `config.lora` the student is the teacher with an adapter, and the adapter alone is trained.
    """
    found = networks.opened(config, RECIPES["distill"])
    task, resolve = distillation(config, found.networks, found.empty)
    dit, vae, text = found.networks.dit, found.networks.vae, found.networks.text
    parts = config.objective.num_ddim_steps
    scheduler = scheduler_config(config, "LCMScheduler", original_inference_steps=parts)

    def components(params, encoders):
        return {
            "transformer": (dit, params),
            "vae": (vae, encoders["vae"]),
            "text_encoder": (text, encoders["text_encoder"]),
        }

    if found.cached:
        sample, export = None, export_beside(config.teacher_path, dit, resolve, scheduler)
    else:
        options = {"num_inference_steps": 4}
        sample, export = outputs(config, components, found.tokenizer, scheduler, options, resolve)
    if config.get("lora"):
        export = with_adapter_file(export)
    return task._replace(loader=found.loader, sample=sample, export=export)


def distillation(config, nets, empty):
    """`(Task, resolve)` of `distill`: the step alone (`train.networks.Recipe`)."""
    run, noise = sampling.denoiser(nets.dit), noise_schedule(config)

    def encode(encoders, raw, key):
        given = features.read(nets, encoders, raw)
        batch = given["text"].shape[0]
        if config.null == "learned":  # PixArt: the stored caption under the prompt's own mask
            null = {"text": encoders["null"][None]}
        else:
            null = features.empty_text(nets, encoders, empty)
        null = {k: jnp.broadcast_to(v, (batch, *v.shape[1:])) for k, v in null.items()}
        cond = {"text": given["text"], "text_mask": given["text_mask"], "null": null}
        x = features.latents(nets, given, key)
        return {"x": x, "cond": {**cond, **features.micro(nets, given)}}

    trainable, frozen, resolve = student_of(config, nets.dit_params)
    objective = objectives.consistency(run, run, noise, resolve, **config.objective)
    encoders = features.encoders_of(nets, empty)
    return Task(objective, trainable, None, encode, encoders, frozen), resolve


RECIPES = {"distill": networks.Recipe("teacher_path", distillation)}
