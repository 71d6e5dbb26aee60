"""The benchmark's arithmetic, and every case at its tiny size."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from eval import benchmark, benchmark_start
from eval.benchmark_cases import CASES


def test_both_sides_run_in_every_repeat():
    calls = []
    sides = {benchmark.OURS: lambda: calls.append("o"), benchmark.THEIRS: lambda: calls.append("t")}
    program = benchmark.Program("p", sides, 2e9, 1e9)
    (row,) = benchmark.measure([program], 4)
    assert calls == ["o", "t"] + ["o", "t", "t", "o"] * 2
    assert (row["GFLOP"], row["GFLOP closed form"]) == (2.0, 1.0)
    assert row["cnxs_jax GFLOP/s"] == pytest.approx(2.0 / row["cnxs_jax s"])
    (other,) = benchmark.measure([dataclasses.replace(program, flops=None)], 1)
    assert other["GFLOP"] == "not counted"
    assert other["diffusers GFLOP/s"] == pytest.approx(1.0 / other["diffusers s"])
    assert row["ratio min"] <= row["ratio"] <= row["ratio max"]


def test_three_sides_take_turns_and_the_compiled_one_has_its_own_ratio():
    calls = []
    sides = {
        side: lambda side=side: calls.append(side)
        for side in (benchmark.OURS, benchmark.THEIRS, benchmark.COMPILED)
    }
    first, second = (benchmark.Program(name, sides, 1e9, 1e9) for name in "ab")
    _, row = benchmark.measure([first, second], 3)
    starts = [calls[n] for n in range(6, len(calls), 6)]
    assert starts == list(sides)
    assert {calls.count(side) for side in sides} == {2 * 4}
    assert row["ratio to compiled min"] <= row["ratio to compiled"] <= row["ratio to compiled max"]
    assert row["diffusers compiled s"] > 0


def test_differences_are_seen_in_the_worst_program_call_and_number():
    class Side:
        """Pictures, and the losses of two steps."""

        def __init__(self, picture, losses):
            self.losses = list(losses)
            self.programs = {"image": lambda: picture, "step": lambda: self.losses.pop(0)}

    picture = jnp.arange(8.0).reshape(1, 2, 2, 2)

    def found(other, losses, compared=("image", "step")):
        ours, theirs = Side(picture, [[2.0, 1e-3]] * 4), Side(other, losses)
        sides = {"a": ours.programs, "b": theirs.programs}
        return benchmark.differences(sides, compared, 2)["b"]

    assert found(picture, [[2.0, 1e-3]] * 2) == 0
    assert found(picture.at[0, 0, 0, 0].add(0.7), [], ("image",)) == pytest.approx(0.1)
    # The second step's gradient, small beside its loss.
    assert found(picture, [[2.0, 1e-3], [2.0, 2e-3]]) == pytest.approx(0.5)


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    size = 64 * 2**20
    found = benchmark.peak_memory(lambda: bytearray(size).count(1))
    assert found is None or 0.9 * size < found < 1.5 * size  # None: no such file in this system


SAME_AT_TINY_SIZE = {
    "pixart_xl_256", "clip_text_h", "lcd_step_xl_512_deep", "controlnet_xs_step_sd15_256",
    "controlnet_shallow_step_sd15_512",
}  # fmt: skip
LONG = {
    "controlnet_sd15_512", "controlnet_step_sd15_512", "controlnet_xs_sd15_512",
    "controlnet_xs_step_sd15_512", "denoise_step_xl_512",
}  # fmt: skip


def slow_if_alike(name):
    """Cases whose tiny size is another one's, or compiles for long, are slow checks."""
    slow = name in SAME_AT_TINY_SIZE | LONG
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


@pytest.mark.parity
@pytest.mark.parametrize("name", [slow_if_alike(name) for name in CASES])
def test_every_case_runs_and_agrees(name):
    rows, facts = benchmark.run(name, "tiny", repeats=1)
    product, *rest = rows
    assert product["GFLOP"] == product["GFLOP closed form"] == pytest.approx(2 * 0.256**3)
    for row in rest:
        # Train steps leave out the gradient towards the text and the picture.
        assert row["GFLOP"] == pytest.approx(row["GFLOP closed form"], rel=0.05)
        assert row["cnxs_jax of ceiling"] > 0
    assert float(facts["largest difference to diffusers"].split()[0]) < 1e-5
    if name == "pixart_xl_512":
        once, four = rest
        assert 3.8 * once["GFLOP"] < four["GFLOP"] < 3.9 * once["GFLOP"]  # the text is read once


@pytest.mark.parity
@pytest.mark.parametrize("name", ["pixart_xl_512", "clip_text_l"])
def test_half_precision_on_both_sides(name):
    """Near the same outputs, and not the float32 ones."""
    rows, facts = benchmark.run(name, "tiny", repeats=1, dtype="bfloat16")
    assert 1e-4 < float(facts["largest difference to diffusers"].split()[0]) < 3e-2
    assert "bfloat16" in facts["case"]
    for row in rows[1:]:
        assert row["GFLOP"] == pytest.approx(row["GFLOP closed form"], rel=0.05)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_text_l", "denoise_step_xl_512"])
def test_diffusers_compiled_computes_the_same(name):
    rows, facts = benchmark.run(name, "tiny", repeats=2, compiled=True)
    assert float(facts["largest difference to diffusers compiled"].split()[0]) < 1e-5
    assert rows[1]["diffusers compiled s"] > 0
    assert rows[1]["ratio to compiled"] > 0


@pytest.mark.slow
def test_a_second_start_compiles_nothing():
    found = benchmark_start.facts("unet_sd15_512", "tiny")
    compiled = [float(text.split("compile ")[1].split(",")[0]) for text in found.values()]
    assert len(compiled) == 2
    assert compiled[1] < 0.5 * compiled[0]


@pytest.mark.parity
def test_the_command_writes_a_table(tmp_path):
    command = [sys.executable, "-m", "eval.benchmark", "--case=clip_text_l", "--size=tiny"]
    subprocess.run([*command, "--repeats=1", f"--out={tmp_path}"], check=True, capture_output=True)
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [r["program"] for r in content["rows"]][1:] == ["one evaluation"]
    assert "one evaluation" in (tmp_path / "benchmark.md").read_text()
