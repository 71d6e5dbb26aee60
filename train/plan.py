r"""`python -m train.plan`: what a recipe takes, without an accelerator and without weights.

  python -m train.plan --config=configs/pixart_lcm.py:xl_1024 --quantize=int8 --vae_tiling
  python -m train.plan --config=configs/pixart_lcm.py:xl_512 --devices=8 --config.mesh.fsdp=8 \
      --what=train

Parameters, weight bytes and FLOPs of every stage of sampling and of a train step, and the memory
that XLA plans for them. The programs are traced on abstract values in an accelerator's forms,
counted (`eval.flops`) and compiled for this machine's CPU: the memory columns are the CPU
compiler's and not a GPU's. One stage's networks are on the device at a time, as `offload="model"`
has it; the last line says whether the largest stage fits.

  python -m train.plan --config=configs/pixart_lcm.py:xl_512 --config.batch_size=1 --measure

runs one real train step on random weights on this machine's CPU instead, in its own forms, and
compares the peak of its memory with the prediction for them.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from cnxs_jax import errors

GB = 1e9
COLUMNS = ("stage", "parameters", "weights GB", "TFLOP", "temp GB (CPU)", "peak GB (CPU)")


def define_flags():
    """The command line; not at import, since other commands have flags of these names."""
    config_flags.DEFINE_config_file("config", None, "The recipe; size, dtype and mesh are its.")
    flags.DEFINE_enum("what", "both", ["both", "sampling", "train"], "Which stages.")
    flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
    flags.DEFINE_float("guidance", 0.0, "Guidance scale; above 1 every step costs twice.")
    flags.DEFINE_integer("batch", 1, "Pictures that are sampled at once.", lower_bound=1)
    flags.DEFINE_enum("quantize", None, ["int8"], "Of the text encoder.")
    flags.DEFINE_bool("vae_tiling", False, "Decode in tiles.")
    flags.DEFINE_integer("devices", 1, "Devices of the mesh, simulated.", lower_bound=1)
    flags.DEFINE_float("device_memory", 8.0, "GB that one device has.", lower_bound=0.0)
    flags.DEFINE_bool("memory", True, "Compile, to know the memory; without it, seconds.")
    flags.DEFINE_bool("measure", False, "Run a real train step on random weights here.")
    flags.DEFINE_string("out", None, "A JSON file for the figures.")


def table(costs):
    """Markdown of `Cost`s."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for c in costs:
        memory = ["not compiled" if v is None else f"{v / GB:.2f}" for v in (c.temporary, c.peak)]
        row = [c.name, f"{c.parameters:,}", f"{c.weights / GB:.2f}", f"{c.flops / 1e12:.3f}"]
        lines.append("| " + " | ".join(row + memory) + " |")
    return "\n".join(lines)


def verdict(costs, limit):
    """Whether the largest of several stages fits into `limit` GB."""
    if any(c.peak is None for c in costs):
        return "fits: not known without compiling (--memory)"
    largest = max(costs, key=lambda c: c.peak)
    answer = "yes" if largest.peak <= limit * GB else "no"
    return (
        f"fits {limit:g} GB, one stage at a time: {answer}; the largest is {largest.name!r} with "
        f"{largest.peak / GB:.2f} GB (memory as compiled for a CPU)"
    )


def sampling(config, args):
    """`(costs, text)` of sampling; `args` are the flags."""
    from cnxs_jax.models import tiling
    from train import abstract

    tile = tiling.TILE if args.vae_tiling else None
    stages = abstract.sampling_stages(
        config, args.steps, args.guidance, args.quantize, tile, args.batch
    )
    costs = [abstract.cost(stage, args.memory) for stage in stages]
    head = f"sampling, {args.batch} x {config.data.size} px, {config.get('dtype') or 'float32'}"
    return costs, f"{head}\n\n{table(costs)}\n\n{verdict(costs, args.device_memory)}\n"


def training(config, args):
    """`(costs, text)` of a train step on the config's mesh."""
    from cnxs_jax import sharding
    from train import abstract, validate

    mesh = sharding.make_mesh(config.mesh)
    validate.check_batch(config, sharding.batch_parts(mesh))
    costs = [abstract.cost(stage, args.memory) for stage in abstract.train_stages(config, mesh)]
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    head = f"train step, batch {config.batch_size}, {config.data.size} px, mesh: {sizes}"
    note = "weights and FLOPs of all devices together, memory of one"
    return costs, f"{head} ({note})\n\n{table(costs)}\n"


def report(config, args):
    """Prints the figures; returns them as plain values."""
    from train import networks

    found, what = {}, args.what
    if what == "both" and networks.recipe_of(config).zeros is not None:
        print("sampling: planned for PixArt's pipelines only\n", flush=True)
        what = "train"
    for name, stages in (("sampling", sampling), ("train", training)):
        if what in ("both", name):
            costs, text = stages(config, args)
            print(text, flush=True)
            found[name] = [c._asdict() for c in costs]
    return found


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    import jax

    args = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    from train import validate
    from train.workdir import expand

    validate.check(args.config)
    config = expand(args.config, ".")
    if args.measure:
        from train import measure

        found = measure.report(config)
    else:
        found = report(config, args)
    if args.out:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["config"])
    errors.run_app(main)
