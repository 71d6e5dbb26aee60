"""A page to draw on: `python -m cnxs_jax.demo`, then open the address that it prints.

It serves this machine only. Arguments are read and checked before jax is imported.
"""

import importlib.util
import os
import pathlib
import sys

from cnxs_jax import __version__
from cnxs_jax.errors import ConfigError, run_main
from cnxs_jax.sample import DEFAULT_MODEL, Parser


def parse(argv=None):
    """The checked command line; raises ConfigError, imports nothing heavy."""
    parser = Parser(prog="python -m cnxs_jax.demo", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), help="diffusers pipeline directory or hub id")
    add("--student", help="a second pipeline, drawn beside the first with its own steps")
    add("--control", help="directory or file of a controller; the page asks for its picture")
    add("--dtype", help="float32 or bfloat16 (default: float32)")
    add("--port", type=int, default=7860, help="of 127.0.0.1 (default 7860)")
    add("--version", action="version", version=__version__)
    args = parser.parse_args(argv)
    if not 1 <= args.port < 2**16:
        raise ConfigError(f"expected 1 to 65535, got {args.port}", "--port")
    return args


def main(argv=None):
    """Parses, loads, serves until it is interrupted; returns the exit code."""
    args = parse(argv)
    if importlib.util.find_spec("gradio") is None:
        fix = 'pip install "gradio>=6.31,<7"'
        raise ConfigError("the page needs gradio, which is not installed", "extra `demo`", fix)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from cnxs_jax.demo import draw
    from cnxs_jax.demo.server import serve
    from cnxs_jax.pipelines.pipeline import load_pipeline

    paths = [args.model] + ([args.student] if args.student else [])
    pipes = [load_pipeline(p, control=args.control, dtype=args.dtype) for p in paths]
    names = [pathlib.Path(path).resolve().name for path in paths]
    serve(draw.studio(names, pipes), args.port)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
