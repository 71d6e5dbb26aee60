"""What a clone downloads stays small: the checkout, its history, and each shipped model."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ASSETS = "cnxs_jax/assets"
MIB = 2**20
VAE = "vae/diffusion_pytorch_model.safetensors"
# MiB of each directory of assets. The plan for sd_tiny was 8; its copy of the VAE is not counted.
BUDGETS = {
    "pixart_tiny": 12,
    "sd_tiny": 11,
    "ediffi_tiny": 10,
    "pixart_tiny_control": 4,
    "scene_clip": 4,
    "scene_checker": 1,
}


def git(*words):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(folder="."):
    """{path below the checkout: bytes} of the files that git tracks."""
    names = git("ls-files", "-z", folder).split("\0")
    return {n: (ROOT / n).stat().st_size for n in names if n and (ROOT / n).is_file()}


def test_what_git_tracks():
    largest = sorted(tracked().items(), key=lambda item: -item[1])[:5]
    assert sum(tracked().values()) < 40 * MIB, largest


def test_the_history():
    assert int(git("rev-list", "--disk-usage", "--objects", "HEAD")) < 100 * MIB


def test_every_shipped_model_is_within_its_budget():
    found = dict.fromkeys(BUDGETS, 0)
    for name, size in tracked(ASSETS).items():
        model, _, rest = name.removeprefix(f"{ASSETS}/").partition("/")
        if rest and (model, rest) != ("sd_tiny", VAE):
            assert model in BUDGETS, f"{model} has no budget"
            found[model] += size
    for model, size in found.items():
        assert 0 < size <= BUDGETS[model] * MIB, f"{model}: {size / MIB:.2f} MiB"


def test_the_vae_is_one():
    """The copy in `sd_tiny` is there so that diffusers opens the directory as it is."""
    ours, copy = (ROOT / ASSETS / model / VAE for model in ("pixart_tiny", "sd_tiny"))
    assert ours.read_bytes() == copy.read_bytes()
