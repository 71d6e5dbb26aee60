r"""`python -m eval.benchmark`: this project and diffusers, the same weights, side by side.

Both run in one process, interleaved, so that a noisy machine disturbs both alike; medians of
several repeats, compilation reported apart, and a matrix product timed in the same run as the
ceiling. FLOPs are counted in our compiled programs (`eval.flops`); the closed form stands beside
them as the check. Writes `benchmark.json` and `benchmark.md` to `--out`. The weights are random: no
speed depends on their values.

  python -m eval.benchmark --case=pixart_xl_512 --out=runs/benchmark      # needs `.[test]`, 8 GB
  python -m eval.benchmark --case=pixart_tiny                             # seconds
"""

import dataclasses
import gc
import platform
import statistics
import time
from pathlib import Path

from absl import flags

from cnxs_jax import errors
from cnxs_jax.storage import write_json, write_text
from eval import flops

CASES = {
    "pixart_tiny": {
        "config": {
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 16,
            "use_additional_conditions": False,
        },
        "tokens": 20,
    },
    "pixart_xl_256": {"config": {"sample_size": 32, "caption_channels": 4096}, "tokens": 120},
    "pixart_xl_512": {"config": {"sample_size": 64, "caption_channels": 4096}, "tokens": 120},
}

CASE = flags.DEFINE_enum("case", "pixart_xl_512", list(CASES), "What to time.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats of each program.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Directory of benchmark.json and benchmark.md.")


@dataclasses.dataclass
class Program:
    """One thing to time on both sides; both functions block until their result is there.

    `flops` is counted in our compiled program (None: `count`), `closed_form` by hand.
    """

    name: str
    ours: object
    theirs: object
    flops: float | None
    closed_form: float


def closed_form_flops(config, tokens):
    """FLOPs of one PixArt evaluation of one picture, 2 a multiply-add: blocks and embedders."""
    heads = config.get("num_attention_heads", 16)
    D = heads * config.get("attention_head_dim", 72)
    N = (config["sample_size"] // 2) ** 2
    block = 2 * N * 14 * D**2 + 4 * N**2 * D + 4 * N * tokens * D
    time, patches = 2 * (256 + D + 6 * D) * D, 2 * N * (4 * 4 + 4 * 8) * D
    blocks = config.get("num_layers", 28) * block
    return blocks + text_flops(config, tokens) + time + patches


def text_flops(config, tokens):
    """The part that reads only the text: its embedding, and every block's keys and values."""
    D = config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72)
    embedding = 2 * tokens * (config["caption_channels"] + D) * D
    return embedding + config.get("num_layers", 28) * 4 * tokens * D**2


def diffusers_model(config):
    """A `PixArtTransformer2DModel` with random weights, none of them zero."""
    import torch
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    return model


def inputs(config, tokens):
    """Latents, text, mask and timestep as numpy; both sides read these."""
    import numpy as np

    rng = np.random.default_rng(0)
    side = config["sample_size"]
    return {
        "x": rng.normal(size=(1, side, side, 4)).astype(np.float32),
        "text": rng.normal(size=(1, tokens, config["caption_channels"])).astype(np.float32),
        "text_mask": np.ones((1, tokens), np.int32),
    }


def torch_programs(model, given, steps):
    """`(forward, sample)` as diffusers runs them: eager, LCMScheduler, no guidance."""
    import torch
    from diffusers import LCMScheduler

    x = torch.tensor(given["x"]).permute(0, 3, 1, 2).contiguous()
    text, mask = torch.tensor(given["text"]), torch.tensor(given["text_mask"])

    def network(x, t):
        return model(
            x,
            encoder_hidden_states=text,
            timestep=torch.as_tensor(t).reshape(1),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
        ).sample

    scheduler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

    def sample():
        with torch.no_grad():
            scheduler.set_timesteps(steps)
            z = x
            for t in scheduler.timesteps:
                z, _ = scheduler.step(network(z, t).chunk(2, 1)[0], t, z, return_dict=False)
            return z.permute(0, 2, 3, 1).numpy()

    def forward():
        with torch.no_grad():
            return network(x, 999).permute(0, 2, 3, 1).numpy()

    return forward, sample


def jax_programs(model, config, given, steps):
    """`(forward, sample, FLOPs of each, compile seconds)`: two compiled programs, same weights."""
    import jax
    import jax.numpy as jnp

    from cnxs_jax.convert import pixart, rules
    from cnxs_jax.diffusion import sampling, schedule, solvers
    from cnxs_jax.models.dit import PixArt

    module = PixArt(**config)
    cond = {k: jnp.asarray(given[k]) for k in ("text", "text_mask")}
    x, t = jnp.asarray(given["x"]), jnp.full((1,), 999)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, cond)["params"]
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    params = jax.tree.map(jnp.asarray, rules.to_params(tensors, shapes, pixart.DIFFUSERS))
    del tensors
    table = solvers.lcm(schedule.linear(), steps)
    denoise = sampling.denoiser(module)
    # The table stays host float64: as an argument its numbers are traced float32.
    table = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), table)

    started = time.perf_counter()
    forward = jax.jit(denoise).lower(params, x, t, cond).compile()
    sample = jax.jit(lambda p, x, cond, table, key: sampling.sample(
        denoise, p, x, cond, table, key)).lower(
        params, x, cond, table, jax.random.key(0)).compile()  # fmt: skip
    seconds = time.perf_counter() - started

    def run_forward():
        return jax.block_until_ready(forward(params, x, t, cond))

    def run_sample():
        return jax.block_until_ready(sample(params, x, cond, table, jax.random.key(0)))

    return run_forward, run_sample, (count(forward), count(sample)), seconds


def count(compiled):
    """FLOPs of a compiled program, or None where a library computes its products (GPUs)."""
    try:
        return flops.count(compiled)
    except errors.DataError as error:
        print(f"not counted: {error}")
        return None


def matrix_product(size=2048):
    """The ceiling: one float32 matrix product on both sides."""
    import jax
    import jax.numpy as jnp
    import torch

    a = torch.ones(size, size)
    b = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(b, b).compile()
    return Program(
        f"matrix product {size}",
        lambda: jax.block_until_ready(product(b, b)),
        lambda: a @ a,
        count(product),
        2.0 * size**3,
    )


def measure(programs, repeats):
    """Rows of medians; every repeat runs each program on both sides, the order alternating."""
    times = {p.name: {"ours": [], "theirs": []} for p in programs}
    for p in programs:  # warm up both
        p.ours(), p.theirs()
    for repeat in range(repeats):
        for p in programs:
            order = ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours")
            for side in order:
                started = time.perf_counter()
                getattr(p, side)()
                times[p.name][side].append(time.perf_counter() - started)
    rows = []
    for p in programs:
        ours, theirs = (times[p.name][s] for s in ("ours", "theirs"))
        work = p.closed_form if p.flops is None else p.flops
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            {
                "program": p.name,
                "GFLOP": "not counted" if p.flops is None else p.flops / 1e9,
                "GFLOP closed form": p.closed_form / 1e9,
                "cnxs_jax s": statistics.median(ours),
                "diffusers s": statistics.median(theirs),
                "ratio": statistics.median(ratios),
                "ratio min": min(ratios),
                "ratio max": max(ratios),
                "cnxs_jax GFLOP/s": work / statistics.median(ours) / 1e9,
                "diffusers GFLOP/s": work / statistics.median(theirs) / 1e9,
            }
        )
    return rows


def markdown(rows, facts):
    """The table, and below it what was measured on."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [v if isinstance(v, str) else f"{v:.3g}" for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {k}: {v}" for k, v in facts.items()), ""])


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise errors.ConfigError(
            f"the other side is missing: {error}", "eval.benchmark", "pip install -e '.[test]'"
        ) from None
    import jax
    import numpy as np

    case, steps = CASES[CASE.value], STEPS.value
    given = inputs(case["config"], case["tokens"])
    model = diffusers_model(case["config"])
    forward, sample, counted, compiling = jax_programs(model, case["config"], given, steps)
    torch_forward, torch_sample = torch_programs(model, given, steps)
    gc.collect()
    a, b = np.asarray(forward()), torch_forward()
    once = closed_form_flops(case["config"], case["tokens"])
    text = text_flops(case["config"], case["tokens"])  # our loop computes it once
    loop = steps * once - (steps - 1) * text
    programs = [
        matrix_product(),
        Program("one evaluation", forward, torch_forward, counted[0], once),
        Program(f"{steps}-step sampling", sample, torch_sample, counted[1], loop),
    ]
    rows = measure(programs, REPEATS.value)
    facts = {
        "case": f"{CASE.value}, batch 1, float32, {REPEATS.value} repeats",
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": f"jax {jax.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}",
        "compilation": f"{compiling:.1f} s for both of our programs, not in the times",
        "FLOPs": "of our programs, on both sides: diffusers reads the text anew in every step, our "
        "loop once",
        "largest difference of one evaluation": f"{np.abs(a - b).max() / np.abs(b).max():.1e}",
    }
    text = markdown(rows, facts)
    print(text)
    if OUT.value:
        out = Path(OUT.value)
        write_json(out / "benchmark.json", {"rows": rows, "facts": facts}, sort_keys=False)
        write_text(out / "benchmark.md", text)
    return 0


if __name__ == "__main__":
    errors.run_app(main)
