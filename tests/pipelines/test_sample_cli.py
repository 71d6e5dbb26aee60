"""The sample command: mistakes end early with one message and the documented exit code."""

import argparse
import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from cnxs_jax import sample
from cnxs_jax.control import hints
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import diffusers_layout as load
from tests.control import estimator

GOOD = ["--prompt=a fox", "--out=x.png"]
BAD = [
    [],
    ["--prompt=a fox"],
    ["--out=x.png"],
    ["--prompt=", "--out=x.png"],
    ["--prompt=  ", "--out=x.png"],
    ["--prompt=a", "--out=x.jpg"],
    ["--prompt=a", "--out=x"],
    [*GOOD, "--promt=b"],
    [*GOOD, "--step=3"],
    [*GOOD, "--steps=0"],
    [*GOOD, "--steps=-4"],
    [*GOOD, "--steps=4.5"],
    [*GOOD, "--seed=-1"],
    [*GOOD, "--seed=4294967296"],
    [*GOOD, "--seed=x"],
    [*GOOD, "--guidance=nan"],
    [*GOOD, "--guidance=-1"],
    [*GOOD, "--guidance=inf"],
    [*GOOD, "--num_images=0"],
    [*GOOD, "--num_images=65"],
    [*GOOD, "--height=0"],
    [*GOOD, "--width=-8"],
    [*GOOD, "--control=adapter"],
    [*GOOD, "--image=lines.png"],
    [*GOOD, "--control=adapter", "--image=nowhere.png"],
    [*GOOD, "--hint=canny"],
    [*GOOD, "--hint=lines", "--control=a", f"--image={__file__}"],
    [*GOOD, "--hint=midas", "--control=a", f"--image={__file__}"],
    [*GOOD, "--hint=canny", "--hint_path=b", "--control=a", f"--image={__file__}"],
    [*GOOD, "stray"],
]


def test_experts_are_read_before_any_weights(tmp_path, monkeypatch):
    (tmp_path / "experts.json").write_text('[{"below": 0.2, "model": "refiner"}]')
    monkeypatch.setattr(load, "read_model", None)
    out = f"--out={tmp_path / 'x.png'}"
    for name, message in (("experts", "denoising_end"), ("nowhere", "no such file of experts")):
        with pytest.raises(ConfigError, match=message):
            sample.main(["--prompt=a", out, f"--experts={tmp_path / name}.json"])


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments(arguments):
    with pytest.raises(ConfigError) as caught:
        sample.parse(arguments)
    assert caught.value.code == 2
    assert caught.value.where


def test_a_misspelt_option_is_named_before_what_is_missing():
    with pytest.raises(ConfigError, match='unknown option --promt. Did you mean "--prompt"'):
        sample.parse(["--promt=a frog"])


def test_a_prompt_may_begin_with_dashes():
    assert sample.parse(["--prompt", "--a frog in the rain--", "--out=x.png"]).prompt[2] == "a"


def test_weights_of_a_hint_that_are_not_there_are_named_at_once():
    given = ["--control=a", f"--image={__file__}", "--hint=midas", "--hint_path=nowhere"]
    with pytest.raises(ConfigError, match="nowhere"):
        sample.parse([*GOOD, *given])


def test_a_folder_is_no_control_picture(tmp_path):
    with pytest.raises(ConfigError, match="a folder"):
        sample.parse([*GOOD, "--control=somewhere", f"--image={tmp_path}"])


def test_a_long_prompt_is_told_in_one_short_line(tmp_path, capfd):
    """What is dropped is quoted in part, no line of code with it."""
    words = "a frog and " * 100
    command = [f"--prompt={words}", f"--out={tmp_path}/x.png", "--steps=1", "--guidance=0"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        sample.main(command)
    (told,) = capfd.readouterr().err.strip().splitlines()
    assert told.startswith("note: caption has 301 tokens, limit 120; dropped: ")
    assert len(told) < 150


def test_words_that_the_model_has_not_learned_are_told(tmp_path, capfd):
    prompt = "a medieval castle and a frog, oil painting, flat style"
    sample.main([f"--prompt={prompt}", f"--out={tmp_path}/x.png", "--steps=1", "--guidance=0"])
    told = "note: this model has not learned the words medieval, castle, painting\n"
    assert capfd.readouterr().err == told


def test_adapters_have_factors():
    given = ["--lora=a", "--lora=a:0.5", "--lora=b:c", "--lora=b:c:2"]
    expected = [("a", 1.0), ("a", 0.5), ("b:c", 1.0), ("b:c", 2.0)]
    assert sample.parse([*GOOD, *given]).lora == expected
    assert sample.parse(GOOD).lora == []


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        sample.main(["--prompt=a fox", f"--out={tmp_path}/x.png", "--lora=nowhere"])


def test_out_must_be_writable_as_a_file(tmp_path):
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("dir.png", "file/x.png", "file/new/deep/x.png", "link/x.png", "link/new/x.png"):
        with pytest.raises(ConfigError) as caught:
            sample.parse(["--prompt=a", f"--out={tmp_path / out}"])
        assert caught.value.where == "--out"
    sample.parse(["--prompt=a", f"--out={tmp_path / 'new' / 'deep' / 'x.png'}"])
    assert not (tmp_path / "new").exists()


def test_out_must_not_be_below_a_closed_directory(tmp_path, monkeypatch):
    """Root may write everywhere, so that the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match="cannot write into") as caught:
        sample.parse(["--prompt=a", f"--out={tmp_path}/new/x.png"])
    assert str(tmp_path) in caught.value.what


def _run(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "cnxs_jax.sample", *arguments]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    message = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done, imported, message, time.monotonic() - start


def test_help_and_mistakes_do_not_import_jax():
    for arguments, code in ((["--help"], 0), ([*GOOD, "--steps=0"], 2)):
        done, imported, message, seconds = _run(*arguments)
        assert done.returncode == code, done.stderr[-500:]
        assert "argparse" in imported
        assert not {"jax", "numpy", "transformers", "torch"} & imported
        assert seconds < 10
    assert message == ["error: expected a positive number, got 0 [--steps]"]
    assert "Traceback" not in done.stderr


def test_several_images_get_numbers(tmp_path):
    one, two = sample._paths(tmp_path / "a.b.png", 2)
    assert (one.name, two.name) == ("a.b_0.png", "a.b_1.png")
    assert sample._paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]


def test_the_control_picture_is_cut_to_size_or_shows_its_edges(tmp_path):
    """A box in the middle of a wide photo."""
    photo = Image.new("RGB", (256, 128), (40, 40, 40))
    photo.paste((240, 240, 240), (96, 32, 160, 96))
    photo.save(tmp_path / "photo.png")
    args = argparse.Namespace(image=str(tmp_path / "photo.png"), hint=None, hint_path=None)
    plain = sample.control_picture(args, 64, 64)
    assert plain.shape == (64, 64, 3)
    assert plain[32, 32].tolist() == [240] * 3
    assert plain[:13].max() <= 60
    args.hint = "canny"
    lines = sample.control_picture(args, 64, 64)
    assert set(np.unique(lines)) == {0, 255}
    rows, columns = np.nonzero(lines[..., 0])
    for found in (rows, columns):  # the box is 16 to 48 px
        assert abs(found.min() - 15.5) <= 1
        assert abs(found.max() - 47.5) <= 1
    assert not lines[20:44, 20:44].any()
    args.hint, args.hint_path = "midas", str(estimator.write(tmp_path / "midas"))
    depth = sample.control_picture(args, 64, 64)
    expected = hints.midas(plain[None], args.hint_path)[0]
    np.testing.assert_array_equal(depth, np.round(255 * expected))
