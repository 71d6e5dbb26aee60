"""Text to PNG: `python -m cnxs_jax.sample --prompt="a frog, flat style" --out=frog.png`.

Arguments are read and checked before jax is imported, so mistakes and `--help` are quick.
"""

import argparse
import math
import os
import pathlib
import re
import sys
import warnings

from cnxs_jax import __version__
from cnxs_jax.errors import ConfigError, did_you_mean, run_main

DEFAULT_MODEL = pathlib.Path(__file__).parent / "assets" / "pixart_tiny"
LINES = DEFAULT_MODEL.with_name("pixart_tiny_control")  # follows lines on DEFAULT_MODEL
MAX_IMAGES = 64
HINTS = ("canny", "hed", "midas")  # what `control.hints` makes of any picture


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are ConfigErrors."""

    def error(self, message):
        raise ConfigError(message, "command line", f"{self.prog} --help")


def parse(argv=None):
    """The checked command line; raises ConfigError, imports nothing heavy."""
    parser = Parser(prog="python -m cnxs_jax.sample", description=__doc__, allow_abbrev=False)
    known = ["--help"]

    def add(name, **options):
        known.append(name)
        parser.add_argument(name, **options)

    add("--model", default=str(DEFAULT_MODEL), help="diffusers pipeline directory or hub id")
    add("--prompt", required=True, help="what to draw")
    add("--negative_prompt", help="what not to draw (needs guidance)")
    add("--out", required=True, help="PNG to write; several images become NAME_0.png, NAME_1.png")
    add("--seed", type=int, default=0, help="same seed, same picture (default 0)")
    add("--steps", type=int, help="network evaluations per image (default: the model's)")
    add("--guidance", type=float, help="guidance scale; 1 or less is off (default: the model's)")
    add("--num_images", type=int, default=1, help="pictures of the same prompt (default 1)")
    add("--height", type=int, help="pixels (default: the model's)")
    add("--width", type=int, help="pixels (default: the model's)")
    add("--control", help="directory or file of a controller; it needs --image")
    add("--image", help="its control picture, such as white lines on black")
    add("--hint", choices=HINTS, help="show it the edges or the depth of --image instead")
    add("--hint_path", help="weights of hed, if not the installed ones, or midas")
    add("--style_image", help="reference picture whose style is taken; a PixArt needs --style")
    add("--style", help="what reads it: the export of a run of configs/pixart_style.py")
    add("--style_scale", type=float, help="its own guidance weight (default: the text's)")
    add("--lora", action="append", metavar="PATH[:FACTOR]", help="adapter to merge; again for more")
    add("--experts", help="JSON file of denoisers for the lower noise, such as SDXL's refiner")
    add("--scheduler", help="ddim, ddpm, euler, dpmpp, deis or lcm (default: the model's)")
    add("--dtype", help="float32 or bfloat16 (default: float32)")
    add("--offload", help='"model" or "sequential": networks are on the device only as they run')
    add("--quantize", help='"int8": the text encoder in half the memory')
    add("--vae_tiling", action="store_true", help="decode large pictures in tiles")
    add("--version", action="version", version=__version__)
    for word in sys.argv[1:] if argv is None else argv:
        name = word.partition("=")[0]
        # Before what is missing is told; a prompt may begin with dashes, too.
        if re.fullmatch(r"--\w+", name) and name not in known:
            what = f"unknown option {name}.{did_you_mean(name, known)}"
            raise ConfigError(what, "command line", f"{parser.prog} --help")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args):
    if not args.prompt.strip():
        raise ConfigError("the prompt is empty", "--prompt", "say what to draw")
    out = pathlib.Path(args.out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{args.out!r} does not end in .png", "--out")
    # Missing directories are made later, so what counts is the nearest one that is there. lexists:
    # where a link leads nowhere, no directory can be made.
    folder = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"cannot write into {folder}", "--out", "name a writable directory")
    if out.is_dir():
        raise ConfigError(f"{out} is a directory", "--out")
    if not 1 <= args.num_images <= MAX_IMAGES:
        raise ConfigError(f"expected 1 to {MAX_IMAGES}, got {args.num_images}", "--num_images")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"expected 0 to 2**32 - 1, got {args.seed}", "--seed")
    for name in ("steps", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"expected a positive number, got {value}", f"--{name}")
    if (args.control is None) != (args.image is None):
        what = "a controller and its picture go together"
        raise ConfigError(what, "--control, --image", "give both or neither")
    for name in ("image", "style_image"):
        path = getattr(args, name)
        if path is not None and not pathlib.Path(path).is_file():
            what = "a folder" if pathlib.Path(path).is_dir() else "no such file"
            raise ConfigError(what, path, f"--{name}: give one picture")
    for name in ("style", "style_scale"):
        if args.style_image is None and getattr(args, name) is not None:
            raise ConfigError("there is no reference picture", f"--{name}", "give --style_image")
    if args.hint and args.image is None:
        raise ConfigError("there is no picture to find edges in", "--hint", "give --image")
    if args.hint_path is not None and args.hint not in ("hed", "midas"):
        raise ConfigError("no hint reads these weights", "--hint_path", "give --hint=hed or midas")
    if args.hint_path is not None and not pathlib.Path(args.hint_path).exists():
        raise ConfigError("there is nothing", args.hint_path, "--hint_path: the network's weights")
    if args.hint == "midas" and args.hint_path is None:
        what, fix = "midas has no weights of its own", "give --hint_path, see docs/controller.md"
        raise ConfigError(what, "--hint", fix)
    args.lora = [adapter(text) for text in args.lora or ()]
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise ConfigError(f"expected a number of 0 or more, got {args.guidance}", "--guidance")


def adapter(text):
    """(path, factor) of one `--lora`; the factor is 1 unless given."""
    path, _, factor = text.rpartition(":")
    try:
        return (path, float(factor)) if path else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0


def main(argv=None):
    """Parses, samples, writes; returns the exit code."""
    args = parse(argv)
    with warnings.catch_warnings():
        warnings.showwarning = tell
        draw(args)
    return 0


def draw(args):
    """Draws what the checked command line asks for."""
    from cnxs_jax.data.text import spelled_out
    from cnxs_jax.pipelines.images import save_png
    from cnxs_jax.pipelines.pipeline import load_pipeline

    pipe = load_pipeline(
        args.model,
        control=args.control,
        lora=args.lora or None,
        experts=args.experts,
        scheduler=args.scheduler,
        dtype=args.dtype,
        offload=args.offload,
        quantize=args.quantize,
        vae_tiling=args.vae_tiling,
        style=args.style,
    )
    for tokenizer, _ in pipe.contexts()[:1]:
        if unknown := spelled_out(tokenizer, args.prompt):
            tell(f"this model has not learned the words {', '.join(unknown)}")
    height, width = pipe.sizes(args.height, args.width)[0]
    result = pipe(
        args.prompt,
        image=None if args.image is None else control_picture(args, height, width),
        negative_prompt=args.negative_prompt,
        style_image=None if args.style_image is None else upright(args.style_image),
        style_scale=args.style_scale,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        height=height,
        width=width,
        num_images_per_prompt=args.num_images,
        seed=args.seed,
    )
    for path, image, parameters in zip(
        _paths(args.out, len(result.images)), result.images, result.parameters, strict=True
    ):
        save_png(image, path, {**parameters, "model": args.model, "version": __version__})
        print(path)


def tell(message, *_, **__):
    """A warning as one line, without the line of code that it comes from."""
    print(f"note: {message}", file=sys.stderr)


def control_picture(args, height, width):
    """uint8 [height, width, 3]: `--image` scaled to cover and cut, or what `--hint` draws of it."""
    from cnxs_jax.control import hints
    from cnxs_jax.data import image_folder

    with image_folder.opened(args.image) as picture:
        pixels = image_folder.covered(image_folder.turned(picture), height, width)
    if args.hint is None:
        return pixels
    return hints.picture({"image": pixels}, args.hint, path=args.hint_path)


def upright(path):
    """The picture of a file as it is seen, PIL."""
    from cnxs_jax.data import image_folder

    with image_folder.opened(path) as picture:
        return image_folder.turned(picture)


def _paths(out, count):
    out = pathlib.Path(out)
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{n}{out.suffix}") for n in range(count)]


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
