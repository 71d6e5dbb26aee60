"""`python -m cnxs_jax.convert SRC DST --to=LAYOUT`: weights from layout to layout.

Layouts: diffusers, official; of ControlNet-XS also fused (with its base in one model, --base) and
research (diffusers 0.24 to 0.26).
"""

import argparse
import pathlib

from cnxs_jax.errors import ConfigError, run_main

LAYOUTS = ("diffusers", "official", "fused", "research")


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cnxs_jax.convert", description=__doc__)
    parser.add_argument("src", help="component or pipeline directory, or weight file")
    parser.add_argument("dst", nargs="?", help="new directory, or .pth/.safetensors for official")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--base", help="the UNet that --to=fused puts beside the controller")
    parser.add_argument("--component", help="component of a pipeline, or state dict of a .pth")
    parser.add_argument("--config", help="config.json, where the source has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the stored weights")
    parser.add_argument("--list", action="store_true", help="names, dtypes and shapes only")
    return parser


def main(argv=None):
    """Converts or lists; 0, or raises a CnxsError."""
    args = parser().parse_args(argv)
    from cnxs_jax.convert.files import SUFFIXES
    from cnxs_jax.pipelines import load

    if args.list:
        return show(args)
    if args.dst is None:
        raise ConfigError("DST is missing", "command line", "give where to write, or --list")
    if args.to != "official" and args.dst.endswith(SUFFIXES):
        what = f"the layout {args.to} is a directory, {args.dst} sounds like a file"
        raise ConfigError(what, "DST", "name a directory, or add --to=official for one file")
    if args.component is None and is_pipeline(args.src):
        return convert_pipeline(args)
    module, params = load.load_model(args.src, args.component, args.config)
    if args.to in ("fused", "research"):
        return save_controlnet_xs(args, module, params)
    null = None
    if type(module).__name__ == "PixArt":
        null = load.load_null_caption(args.src, args.component)
        if null is None:
            print("note: the source has no learned null caption; guidance uses the empty prompt")
    save = load.save_model if args.to == "diffusers" else load.save_official
    save(module, params, args.dst, dtype=args.dtype, null_caption=null)
    print(f"{args.dst}: {type(module).__name__}, {args.to} layout")
    return 0


def convert_pipeline(args):
    """A whole pipeline: diffusers' layout, or Stable Diffusion's single file."""
    from cnxs_jax.pipelines.pipeline import load_pipeline, save_pipeline
    from cnxs_jax.pipelines.single_file import save_single_file

    layouts = {"diffusers": save_pipeline, "official": save_single_file}
    if args.to not in layouts:
        raise ConfigError(
            f"there is no layout {args.to!r} of a pipeline", "--to", "name a --component"
        )
    save = layouts[args.to]
    save(load_pipeline(args.src), args.dst, args.dtype)
    print(f"{args.dst}: the whole pipeline, {args.to} layout")
    return 0


def save_controlnet_xs(args, module, params):
    """The layouts that only ControlNet-XS has."""
    from cnxs_jax.pipelines import load, save_xs

    if type(module).__name__ != "ControlNetXS":
        raise ConfigError(f"there is no layout {args.to!r} of {type(module).__name__}", "--to")
    if args.to == "research":
        save_xs.save_research(module, params, args.dst, args.dtype)
    elif args.base is None:
        raise ConfigError("the fused model holds the base, too", "--to=fused", "give --base")
    else:
        save_xs.save_fused(load.load_model(args.base), (module, params), args.dst, args.dtype)
    print(f"{args.dst}: {type(module).__name__}, {args.to} layout")
    return 0


def is_pipeline(path):
    """Whether `path` is a diffusers pipeline directory."""
    return (pathlib.Path(path) / "model_index.json").is_file()


def show(args):
    """Prints the tensors of a file or component without loading them."""
    from cnxs_jax.convert import files
    from cnxs_jax.pipelines.load import component_directory

    source, which = pathlib.Path(args.src), args.component
    if source.is_dir():
        source, which = files.find_weights(component_directory(source, which)), None
    tensors = files.read_tensors(source, which)
    for key, array in sorted(tensors.items()):
        print(f"{key}  {array.dtype}  {list(array.shape)}")
    print(f"{len(tensors)} tensors, {sum(a.size for a in tensors.values()):,} numbers")
    return 0


if __name__ == "__main__":
    run_main(main)
