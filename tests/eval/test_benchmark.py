"""The benchmark's arithmetic, and every case at its tiny size."""

import dataclasses
import json
import subprocess
import sys

import pytest

from eval import benchmark
from eval.benchmark_cases import CASES


def test_both_sides_run_in_every_repeat():
    calls = []
    program = benchmark.Program("p", lambda: calls.append("o"), lambda: calls.append("t"), 2e9, 1e9)
    (row,) = benchmark.measure([program], 4)
    assert calls == ["o", "t"] + ["o", "t", "t", "o"] * 2
    assert (row["GFLOP"], row["GFLOP closed form"]) == (2.0, 1.0)
    assert row["cnxs_jax GFLOP/s"] == pytest.approx(2.0 / row["cnxs_jax s"])
    (other,) = benchmark.measure([dataclasses.replace(program, flops=None)], 1)
    assert other["GFLOP"] == "not counted"
    assert other["diffusers GFLOP/s"] == pytest.approx(1.0 / other["diffusers s"])
    assert row["ratio min"] <= row["ratio"] <= row["ratio max"]


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    size = 64 * 2**20
    found = benchmark.peak_memory(lambda: bytearray(size).count(1))
    assert found is None or 0.9 * size < found < 1.5 * size  # None: no such file in this system


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_agrees(name):
    rows, facts = benchmark.run(name, "tiny", repeats=1)
    product, *rest = rows
    assert product["GFLOP"] == product["GFLOP closed form"] == pytest.approx(2 * 0.256**3)
    for row in rest:
        # Train steps leave out the gradient towards the text and the picture.
        assert row["GFLOP"] == pytest.approx(row["GFLOP closed form"], rel=0.05)
        assert row["cnxs_jax of ceiling"] > 0
    if CASES[name].compared:
        assert float(facts["largest difference of one evaluation"]) < 1e-5
    if name == "pixart_xl_512":
        once, four = rest
        assert 3.8 * once["GFLOP"] < four["GFLOP"] < 3.9 * once["GFLOP"]  # the text is read once


@pytest.mark.parity
def test_the_command_writes_a_table(tmp_path):
    command = [sys.executable, "-m", "eval.benchmark", "--case=clip_text_l", "--size=tiny"]
    subprocess.run([*command, "--repeats=1", f"--out={tmp_path}"], check=True, capture_output=True)
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [r["program"] for r in content["rows"]][1:] == ["one evaluation"]
    assert "one evaluation" in (tmp_path / "benchmark.md").read_text()
