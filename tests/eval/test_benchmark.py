"""The benchmark's arithmetic, and one tiny run of it."""

import dataclasses
import json
import subprocess
import sys

import pytest

from eval import benchmark


def test_closed_form_of_published_sizes():
    """Counts of PyTorch's FlopCounterMode on the official modules, to three digits."""
    for case, tera in (("pixart_xl_256", 0.298), ("pixart_xl_512", 1.236)):
        values = benchmark.CASES[case]
        flops = benchmark.closed_form_flops(values["config"], values["tokens"])
        assert flops / 1e12 == pytest.approx(tera, rel=3e-3)


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


@pytest.mark.parity
def test_tiny_run_agrees_with_diffusers(tmp_path):
    command = [sys.executable, "-m", "eval.benchmark", "--case=pixart_tiny", "--repeats=1"]
    subprocess.run([*command, f"--out={tmp_path}"], check=True, capture_output=True)
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert float(content["facts"]["largest difference of one evaluation"]) < 1e-5
    assert [r["program"] for r in content["rows"]][1:] == ["one evaluation", "4-step sampling"]
    product, once, four = content["rows"]
    assert product["GFLOP"] == product["GFLOP closed form"] == 2 * 2.048**3
    assert once["GFLOP"] == pytest.approx(once["GFLOP closed form"], rel=1e-3)
    assert four["GFLOP"] == pytest.approx(four["GFLOP closed form"], rel=1e-3)
    assert 3.8 * once["GFLOP"] < four["GFLOP"] < 3.9 * once["GFLOP"]  # the text is read once
    assert "4-step sampling" in (tmp_path / "benchmark.md").read_text()
