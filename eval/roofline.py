"""The least time that a published card needs for PixArt's few-step sampling: no figure is measured.

Text encoding (T5-XXL), the steps of LCM at 1024 px without guidance, and the decoder, in bfloat16.
Each program is lowered without weights, as for an accelerator, and walked (`eval.flops`): every
matrix product and convolution has its FLOPs and the bytes of its operands and its result. A product
takes at least the longer of FLOPs / peak and bytes / bandwidth. The logits of attention are counted
as never leaving the chip, as in the fused kernels; elementwise work is counted as free.

  python -m eval.roofline
  python -m eval.roofline --out=runs/roofline --card=h100_pcie --steps=14
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags, logging

from cnxs_jax import backend, errors
from cnxs_jax.storage import check_directory, write_json, write_text
from eval import flops

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KIND = re.compile(r"([a-z]+[0-9a-z]*)\[")


class Card(NamedTuple):
    """Published peaks: dense bfloat16 products with float32 sums, and memory; a second."""

    name: str
    flops: float
    bytes: float


# NVIDIA, "H100 Tensor Core GPU" data sheet: 1979 and 1513 TFLOP/s are with sparsity, half without.
CARDS = {
    "h100_sxm": Card("NVIDIA H100 SXM", 989.4e12, 3.35e12),
    "h100_pcie": Card("NVIDIA H100 PCIe", 756e12, 2.0e12),
}


class Work(NamedTuple):
    """FLOPs, bytes and the least seconds of a program."""

    flops: float
    bytes: float
    seconds: float


def work(program, card):
    """`Work` of a lowered or compiled program on a `Card`."""
    hlo = flops.text_of(program)
    traffic = {"dot": dot_bytes, "convolution": product_bytes}
    least = {
        "dot": functools.partial(_seconds, card, flops.dot, dot_bytes),
        "convolution": functools.partial(_seconds, card, flops.convolution, product_bytes),
    }
    figures = (flops.count_text(hlo, p) for p in (None, traffic, least))
    return Work(*(float(f) for f in figures))


def _seconds(card, count, traffic, *op):
    return max(count(*op) / card.flops, traffic(*op) / card.bytes)


def product_bytes(op, inside, total, computations):
    """Both operands and the result."""
    return sum(sizes(op, inside))


def dot_bytes(op, inside, total, computations):
    """The same; of a batched product the largest array is the logits of attention, left out."""
    found = sizes(op, inside)
    batched = re.search(r"lhs_batch_dims=\{[0-9,]+\}", op.text)
    return sum(found) - max(found) if batched else sum(found)


def sizes(op, inside):
    """Bytes of the two operands and of the result."""
    shapes = [inside[name].shape for name in flops.names(op.text)[:2]] + [op.shape]
    return [math.prod(flops.dimensions(s)) * BYTES[KIND.search(s)[1]] for s in shapes]


def programs(size="full", steps=4):
    """{name: lowered program} of the pipeline's parts."""
    from eval.benchmark_networks import VAEDecode
    from eval.benchmark_pipeline import PixArtWithText

    case, decoder = (C(size, steps, "bfloat16") for C in (PixArtWithText, VAEDecode))
    if size == "full":
        decoder.given["side"] = 128
    # Attention as one einsum for all heads, so that its logits can be told apart.
    transformer = case.modules["transformer"].clone(attention_impl="xla")
    case.modules["transformer"] = transformer
    loop = f"{steps}-step sampling"
    with backend.assume(backend.ACCELERATOR):
        text, sampled = _text(case), case.lower(only=loop)[loop]
    with backend.assume("gpu"):  # its one head is too wide for the fused kernel
        decoded = decoder.lower(only="one evaluation")["one evaluation"]
    return {"text encoding": text, f"text encoding and {loop}": sampled, "decoding": decoded}


def _text(case):
    """Text encoding alone."""
    text, (_, cond) = case.modules["text"], case.inputs()
    encode = jax.jit(lambda params, *ids: text.apply({"params": params}, *ids))
    return encode.lower(case.abstract()["text"], cond["ids"], cond["mask"])


def table(found, card):
    """Markdown of {name: Work}."""
    lines = [
        "| program, bfloat16, one picture | TFLOP | GB | least ms | ms at peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, w in found.items():
        peak = 1e3 * w.flops / card.flops
        lines.append(
            f"| {name} | {w.flops / 1e12:.3g} | {w.bytes / 1e9:.3g} | {1e3 * w.seconds:.3g} "
            f"| {peak:.3g} |"
        )
    told = f"{card.flops / 1e12:g} TFLOP/s dense bfloat16, {card.bytes / 1e12:g} TB/s (published)"
    return "\n".join([*lines, "", f"- {card.name}: {told}; jax {jax.__version__}", ""])


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.WARNING)  # JAX says at length which backends are not there
    if OUT.value:
        check_directory(OUT.value, "--out")
    card = CARDS[CARD.value]
    found = {k: work(p, card) for k, p in programs(SIZE.value, STEPS.value).items()}
    text = table(found, card)
    print(text)
    if OUT.value:
        rows = {name: w._asdict() for name, w in found.items()}
        write_json(Path(OUT.value) / "roofline.json", rows, sort_keys=False)
        write_text(Path(OUT.value) / "roofline.md", text)
    return 0


if __name__ == "__main__":
    CARD = flags.DEFINE_enum("card", "h100_sxm", list(CARDS), "Whose published peaks.")
    SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "The published widths, or seconds.")
    STEPS = flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
    OUT = flags.DEFINE_string("out", None, "Directory of roofline.json and roofline.md.")
    errors.run_app(main)
