"""What the tasks are made of: config tables, latents, conditions, samples and exports."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import lora
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart
from cnxs_jax.diffusion import schedule
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.pipelines.images import make_grid, to_uint8
from cnxs_jax.pipelines.scheduler import read_json
from cnxs_jax.storage import write_json
from train import inputs, objectives, optimizer, validate

REMAT = validate.choice("full", *(n for n in dir(jax.checkpoint_policies) if n[0] != "_"))
SCHEDULE = {
    "name": validate.choice("linear", "scaled_linear"),
    "beta_start": validate.number(0, 1, open_low=True, open_high=True),
    "beta_end": validate.number(0, 1, open_low=True, open_high=True),
    "num_steps": validate.integer(2, 10_000),
}

LORA = {
    "rank": validate.integer(1),
    "alpha": validate.Optional(validate.number(0, open_low=True)),
    "targets": validate.patterns,
}


def fields(module):
    """The table of the config keys of a Linen module, checked by the type of their defaults."""
    kinds = {bool: validate.boolean, int: validate.integer(1), float: validate.number()}
    open_kinds = {"float | None": validate.number(), "int | None": validate.integer(1)}
    each = {bool: validate.booleans, int: validate.integers(), str: validate.texts}
    apart = ("parent", "name", "dtype", "quantization")
    own = [f for f in dataclasses.fields(module) if f.name not in apart]
    table = {}
    for field in own:
        kind = kinds.get(type(field.default))
        if isinstance(field.default, tuple):
            kind = each[type(field.default[0])]
        elif field.default is None:
            kind = REMAT if field.name == "remat" else open_kinds.get(annotation(field))
        elif type(field.default) is int and annotation(field) == "int | tuple":
            kind = validate.counts
        table[field.name] = validate.Optional(kind or validate.anything)
    return {**table, "dtype": validate.Optional(validate.choice("float32", "bfloat16"))}


def annotation(field):
    """The type of a dataclass field as it is written."""
    return field.type if isinstance(field.type, str) else str(field.type)


def make(module, config):
    """`module(**config)` with tuples and dtypes as it wants them."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
    if "dtype" in values:
        values["dtype"] = jnp.dtype(values["dtype"] or "float32")
    return module(**values)


def noise_schedule(config):
    """The `NoiseSchedule` of `config.schedule`."""
    values = config.schedule
    make_schedule = getattr(schedule, values.name)
    return make_schedule(values.beta_start, values.beta_end, values.num_steps)


def check_scheduler(config, path):
    """Raises ConfigError where `config` contradicts the scheduler of the pipeline at `path`.

    A network asked for noise that was trained to give v still runs, and learns nothing.
    """
    file = pathlib.Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    found = read_json(file)
    prediction = found.get("prediction_type", "epsilon")
    if prediction != config.objective.prediction:
        raise ConfigError(
            f"the pipeline predicts {prediction}, the config says {config.objective.prediction}",
            "config.objective.prediction",
            f"set it to {prediction!r} as {file} has it",
        )
    theirs, ours = schedule.from_config(found), noise_schedule(config)
    same = theirs.num_train_timesteps == ours.num_train_timesteps
    if not same or not np.allclose(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-6):
        raise ConfigError(
            "another noise schedule than the pipeline was trained with",
            "config.schedule",
            f"take the betas of {file}",
        )


def check_fit(dit, vae, text, size, where="config.transformer"):
    """Raises ConfigError unless the networks of a pipeline fit each other and `size` px."""
    if dit.in_channels != vae.latent_channels:
        raise ConfigError(
            f"in_channels {dit.in_channels}, the VAE has {vae.latent_channels}", where
        )
    if not isinstance(text, T5Encoder):
        raise ConfigError(f"a {type(text).__name__} is no T5 encoder", "config.text_encoder_path")
    if dit.caption_channels != text.d_model:
        raise ConfigError(
            f"caption_channels {dit.caption_channels}, the text encoder gives {text.d_model}", where
        )
    step = vae.downsample_factor * dit.patch_size
    if size % step:
        raise ConfigError(
            f"{size} px are not a multiple of {step}, VAE and patches together",
            "config.data.size",
            f"the nearest are {validate.nearest(size, step)}",
        )


def check_vocabulary(tokenizer, text, where="config.text_encoder"):
    """Raises ConfigError unless a text encoder has a row for every token."""
    if len(tokenizer) > text.vocab_size:  # a lookup beyond the table would be NaN
        what = f"vocab_size {text.vocab_size} is less than the tokenizer's {len(tokenizer)}"
        raise ConfigError(what, f"{where}.vocab_size")


def check_tokenizer(tokenizer, text, where="config.text_encoder"):
    """The same of CLIP's, which must know the token that ends a text, too."""
    check_vocabulary(tokenizer, text, where)
    if tokenizer.eos_token_id != text.eos_token_id:
        what = f"eos_token_id {text.eos_token_id}, the tokenizer ends with {tokenizer.eos_token_id}"
        raise ConfigError(what, f"{where}.eos_token_id")


def to_signed(image):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def from_signed(image):
    """float [-1, 1] -> float [0, 1], on the host."""
    return np.asarray(image) * 0.5 + 0.5


def tiles(images):
    """float [N,H,W,3] in [0, 1] -> one uint8 picture, eight in a row. NumericsError on NaN."""
    return _grid(images, min(8, len(images)))


def stacked(*sets):
    """The same of two sets or more, eight in a row: each row of a set over its own of the next."""
    parts = [x[n : n + 8] for n in range(0, len(sets[0]), 8) for x in sets]
    return _grid(np.concatenate(parts), min(8, len(sets[0])))


def _grid(images, columns):
    return np.asarray(make_grid(to_uint8(images), -(-len(images) // columns), columns, gap=0))


def latents(vae, params, image, key):
    """Scaled latents of uint8 pictures, drawn from the VAE's posterior as PixArt trains."""
    return drawn(vae, *vae.apply({"params": params}, to_signed(image), method="encode"), key)


def drawn(vae, mean, logvar, key):
    """Scaled latents [B,h,w,C] drawn from a posterior of these moments."""
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return (z - (vae.shift_factor or 0.0)) * vae.scaling_factor


def t5_text(module, params, tokens):
    """`text` [B,L,D] and `text_mask` [B,L] of `input_ids` and `attention_mask`."""
    mask = jnp.asarray(tokens["attention_mask"])
    text = module.apply({"params": params}, tokens["input_ids"], mask)
    return {"text": text, "text_mask": mask}


def with_text_encoder(denoise, encode):
    """A denoiser that reads tokens, so that its text encoder trains along.

    Args:
        denoise: reads the whole tree of parameters.
        encode: `(params["text_encoder"], cond) -> keys of cond` that `denoise` reads.
    """

    def joint(params, x, t, cond):
        return denoise(params, x, t, {**cond, **encode(params["text_encoder"], cond)})

    return joint


def with_head(init, name, shape, scale):
    """`init` with a linear head's kernel beside it; like it, parameters or a function of a key."""
    if not callable(init):  # given parameters stay on the host
        drawn = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        return {**init, name: scale * drawn}

    def both(key):
        key_rest, key_head = jax.random.split(key)
        return {**init(key_rest), name: scale * jax.random.normal(key_head, shape)}

    return both


def sizes_of(dit, raw):
    """Micro-conditioning: `size` [B,2] and `aspect` [B,1] of a raw batch, or nothing.

    Buckets know both: the file's height and width, px, and the bucket's ratio, as PixArt-alpha
    trains. Otherwise they are those of the pictures [B,H,W,3].
    """
    return picture_sizes(raw) if dit.micro_conditioning else {}


def picture_sizes(raw):
    """`size` and `aspect` of a raw batch."""
    if "aspect" in raw:
        return {"size": raw["original_size"].astype(jnp.float32), "aspect": raw["aspect"]}
    batch, height, width = raw["image"].shape[:3]
    size = jnp.broadcast_to(jnp.array([[height, width]], jnp.float32), (batch, 2))
    return {"size": size, "aspect": jnp.full((batch, 1), height / width)}


def whole_mask(length):
    return jnp.ones((1, length), jnp.int32)


def scheduler_config(config, class_name, **options):
    """A diffusers scheduler's config for the network that `config` trains."""
    return {
        "_class_name": class_name,
        **schedule.to_config(noise_schedule(config)),
        "prediction_type": config.objective.prediction,
        **options,
    }


def outputs(
    config,
    components,
    tokenizer,
    scheduler,
    options,
    resolve,
    family="PixArtAlphaPipeline",
    entries=None,
):
    """`(sample, export)` of a task whose result is a whole pipeline of this family.

    `resolve` makes the network's parameters of the trained and the frozen ones; `entries` are those
    of model_index.json that are no components.
    """

    def pipeline(ema, frozen, encoders):
        from cnxs_jax.pipelines.base import Component
        from cnxs_jax.pipelines.pipeline import FAMILIES

        found = components(resolve(ema, frozen), encoders)
        parts = {k: Component(*v) for k, v in found.items()}
        null = encoders.get("null")
        return FAMILIES[family](
            parts, tokenizer, scheduler, null_text=null, options=entries or {}
        )  # fmt: skip

    captions = inputs.shown(config)["caption"]

    def sample(ema, frozen, encoders):
        pipe = pipeline(ema, frozen, encoders)
        return tiles(pipe(captions, seed=0, output_type="np", **options).images)

    def export(ema, frozen, encoders, path):
        from cnxs_jax.pipelines.pipeline import save_pipeline

        save_pipeline(pipeline(ema, frozen, encoders), path)

    return sample, export


def export_beside(path, dit, resolve, scheduler):
    """`export` of a network trained on cached features: the rest is copied from the pipeline at
    `path`, whose encoders were not loaded."""

    def export(ema, frozen, encoders, target):
        from cnxs_jax.pipelines.load import load_null_caption, save_model

        shutil.copytree(
            path,
            target,
            ignore=shutil.ignore_patterns("transformer", "scheduler"),
            dirs_exist_ok=True,
        )
        null = load_null_caption(path, "transformer")
        save_model(dit, resolve(ema, frozen), target / "transformer", null_caption=null)
        write_json(target / "scheduler" / "scheduler_config.json", scheduler)
        index = read_json(target / "model_index.json")
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        write_json(target / "model_index.json", index)

    return export


def student_of(config, teacher, start=None):
    """`(trainable, frozen, resolve)` of a student: an adapter, or what is not frozen of a copy.

    `start` are the parameters that a student with more of them than its teacher starts from.
    """
    if config.get("lora"):
        options = config.lora

        def fresh(key):
            targets = tuple(options.targets)
            return lora.init(teacher, targets, options.rank, key, options.get("alpha"))

        return fresh, {"teacher": teacher}, objectives.with_lora
    start = teacher if start is None else start
    trainable, rest = optimizer.freeze(start, tuple(config.get("freeze") or ()))
    resolve = objectives.with_frozen if jax.tree.leaves(rest) else objectives.identity
    return trainable, {"teacher": teacher, "rest": rest}, resolve


def with_adapter_file(export, table=pixart.DIFFUSERS, prefix="transformer"):
    """`export` of the merged pipeline, with the adapter beside it as diffusers and PEFT read it.

    `table` and `prefix` are those of the network that it adapts (`convert.lora.save`).
    """

    def both(ema, frozen, encoders, path):
        export(ema, frozen, encoders, path)
        for name in ("pytorch_lora_weights.safetensors", "peft"):
            lora_files.save(ema, path / "lora" / name, table, prefix)

    return both
