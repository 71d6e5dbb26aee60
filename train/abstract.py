"""Programs of a recipe on abstract values: lowered and compiled, never run, no weights anywhere.

They are traced in the forms of an accelerator (`cnxs_jax.backend`) and compiled for this machine's
CPU, whose compiler lays out memory differently from a GPU's: its figures are labelled so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnxs_jax import backend, sharding
from cnxs_jax import tree as trees
from cnxs_jax.convert import families, quantize
from cnxs_jax.diffusion import solvers
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import control, programs
from eval import flops
from train import inputs, networks, optimizer
from train.parts import scheduler_config
from train.step import init_state, make_step


class Stage(NamedTuple):
    """One program, lowered, and the parameters that it reads.

    `weights` are those that it must have beside what it computes, `parameters` their number.
    """

    name: str
    lowered: Any
    parameters: int
    weights: int


class Cost(NamedTuple):
    """What a stage takes; bytes on one device, None where nothing was compiled.

    `peak` = arguments + results that do not lie in donated arguments + temporaries.
    """

    name: str
    parameters: int
    weights: int
    flops: float
    temporary: int | None
    peak: int | None


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nbytes(tree):
    """Bytes of a tree of arrays or shapes, whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cost(stage, memory=True):
    """The `Cost` of a stage; `memory=False` spares the compilation."""
    counted = flops.count(stage.lowered)
    head = stage.name, stage.parameters, stage.weights, counted
    if not memory:
        return Cost(*head, None, None)
    found = stage.lowered.compile().memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    temporary = found.temp_size_in_bytes
    return Cost(*head, temporary, found.argument_size_in_bytes + results + temporary)


def traced(program, *static, **named):
    """A new jitted form of a pipeline's program: that one's own cache must not see the forms of an
    assumed backend."""
    return jax.jit(lambda *args: program.__wrapped__(*static, *args, **named))


def built(config):
    """`(Task, what else its recipe gives, shapes)` of a config without weights or data.

    `shapes` has "state", "frozen", "encoders" and "batch"; the Task's own parameters are gone.
    """
    recipe = networks.recipe_of(config)
    tx, kept = optimizer.make_optimizer(config.optimizer, config.steps), []

    def make():
        found = (recipe.zeros or networks.zeros)(config, config[recipe.path])
        length = inputs.max_length(config)
        one = jnp.ones((1, length), jnp.int32)
        task, more = recipe.build(config, found, {"input_ids": one, "attention_mask": one})
        key = jax.random.key(0)
        params = task.params(key) if callable(task.params) else task.params
        raw = raw_batch(config, recipe)
        kept.append((task._replace(params=None, encoders=None, frozen=None), more))
        return {
            "state": init_state(params, tx),
            "frozen": task.frozen,
            "encoders": task.encoders,
            "raw": raw,
            "batch": task.encode(task.encoders, raw, key),
        }

    shapes = jax.eval_shape(make)
    return *kept[0], shapes


def raw_batch(config, recipe):
    """A batch of zeros as the loader gives it."""
    batch, side, length = config.batch_size, config.data.size, inputs.max_length(config)
    raw = {name: jnp.zeros((batch, side, side, 3), jnp.uint8) for name in recipe.arrays}
    tokens = jnp.ones((batch, length), jnp.int32)
    return raw | {"input_ids": tokens, "attention_mask": tokens}


def train_stages(config, mesh):
    """Stages of one train step on a mesh: what the encoders do, and the step."""
    with backend.assume(backend.ACCELERATOR), jax.set_mesh(mesh):
        task, _, shapes = built(config)
        rules = tuple(config.get("rules") or ())
        whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

        def placed(tree, strict=False):
            return sharding.abstract(tree, sharding.shardings(tree, mesh, rules, strict=strict))

        state = placed(shapes["state"], strict=True)
        frozen, encoders = placed(shapes["frozen"]), placed(shapes["encoders"])
        batch, raw = (
            jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), shapes[k])
            for k in ("batch", "raw")
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        tx = optimizer.make_optimizer(config.optimizer, config.steps)
        warmup = config.get("ema_warmup", False)
        step = make_step(task.objective, tx, config.ema_decay, config.grad_accum, warmup)
        out = (jax.tree.map(lambda s: s.sharding, state), whole)
        run = jax.jit(step, donate_argnums=0, out_shardings=out)
        lowered = run.lower(state, frozen, batch, key)
        encode = jax.jit(task.encode).lower(encoders, raw, key)
    return [
        Stage("encoders", encode, trees.size(encoders), nbytes(encoders)),
        Stage("train step", lowered, trees.size(state.params), nbytes((state, frozen))),
    ]


def sampling_stages(config, steps=4, guidance=0.0, quantized=None, tile=None, batch=1):
    """Stages of sampling one batch: text encoder, denoising loop, autoencoder.

    With a controller the control picture is encoded before them.

    Args:
        steps: of the LCM solver.
        guidance: scale; above 1 the network runs twice a step.
        quantized: "int8" for the text encoder.
        tile: latents a side that the autoencoder decodes at once.
    """
    recipe = networks.recipe_of(config)
    if recipe.zeros is not None:
        what = "of this task only the train step can be planned, not sampling"
        raise ConfigError(what, config.task, "--what=train")
    with backend.assume(backend.ACCELERATOR):
        found = networks.modules(config, config[recipe.path])
        text, latents = text_stage(config, found, quantized, batch), latent_shape(config, found)
        loop = denoise_stage(config, found, steps, guidance, latents, batch)
        vae, weights = found["vae"]
        side = config.data.size
        run = traced(programs.decode, vae, size=(side, side), tile=tile)
        lowered = run.lower(weights, struct(batch, *latents))
        tiled = "" if tile is None else f", tiles of {tile}"
        name, number = f"autoencoder{tiled}", trees.size(weights)
        stages = [text, loop, Stage(name, lowered, number, nbytes(weights))]
        if config.get("control"):
            encode = traced(control.encode_picture, vae)
            lowered = encode.lower(weights, struct(batch, side, side, 3))
            stages.insert(0, Stage("control picture", lowered, number, nbytes(weights)))
        return stages


def latent_shape(config, found):
    """(h, w, C) of a picture of the config's size."""
    vae = found["vae"][0]
    side = config.data.size // vae.downsample_factor
    return side, side, found["transformer"][0].in_channels


def text_stage(config, found, quantized, batch):
    """The text encoder on `batch` texts."""
    module, weights = found["text_encoder"]
    if quantized is not None:
        module = quantize.quantized(module, quantized)
        whole = {k: (v.dtype == jnp.int8 or k.endswith("_scale"), v)
                 for k, v in trees.flatten(families.shapes(module)).items()}  # fmt: skip
        weights = trees.unflatten(
            {k: v if own else struct(*v.shape, dtype=module.dtype) for k, (own, v) in whole.items()}
        )
    ids = struct(batch, inputs.max_length(config), dtype=jnp.int32)
    lowered = traced(programs.encode_text, module).lower(weights, ids, ids)
    name = "text encoder" + (f", {quantized}" if quantized else f", {module.dtype.name}")
    return Stage(name, lowered, trees.size(found["text_encoder"][1]), nbytes(weights))


def denoise_stage(config, found, steps, guidance, latents, batch):
    """The sampling loop of the network that the config trains, its controller included."""
    module, weights = found["transformer"]
    cond = condition(config, found, batch)
    if config.get("control"):
        _, module, shapes = built(config)
        weights = {"base": shapes["frozen"]["base"], "control": shapes["state"].params}
        cond["hint"] = struct(batch, *latents)
    weights = jax.tree.map(lambda s: struct(*s.shape, dtype=found["transformer"][0].dtype), weights)
    if guidance > 1:
        cond["null"] = {k: cond[k] for k in ("text", "text_mask")}
        cond["guidance_scale"] = struct(batch)
    table = solvers.from_config(scheduler_config(config, "LCMScheduler"), steps)
    table = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), table)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    run = traced(programs.denoise, module)
    lowered = run.lower(weights, struct(batch, *latents), cond, table, keys)
    return Stage(f"{steps} steps", lowered, trees.size(weights), nbytes(weights))


def condition(config, found, batch):
    """Shapes of what the network reads."""
    length, width = inputs.max_length(config), found["transformer"][0].caption_channels
    cond = {
        "text": struct(batch, length, width),
        "text_mask": struct(batch, length, dtype=jnp.int32),
    }
    if found["transformer"][0].micro_conditioning:
        cond |= {"size": struct(batch, 2), "aspect": struct(batch, 1)}
    return cond
