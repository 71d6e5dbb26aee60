"""The ControlNet-XS pipelines against diffusers, from its directories and back.

diffusers 0.42 has them among its deprecated pipelines, under their old names.
`pytest -m slow tests/parity/test_xs_pipeline.py` runs the rest: what compiles programs of its own.
"""

import inspect
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetXSAdapter,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionXLControlNetXSPipeline,
)

from cnxs_jax import load_model, load_pipeline, save_pipeline
from cnxs_jax.pipelines.control import Controller
from cnxs_jax.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionXLPipeline
from tests.parity.helpers import perturb
from tests.parity.test_sd_pipeline import SCHEDULERS, _same_step_noise, _theirs
from tests.pipelines import tiny_sd

pytestmark = pytest.mark.parity

# Channels and groups of which the two ways of diffusers make something else.
ADAPTER = dict(
    block_out_channels=(6, 24),
    base_block_out_channels=(8, 16),
    num_attention_heads=(2, 3),
    conditioning_embedding_out_channels=(4, 6),
    max_norm_num_groups=5,
    sample_size=8,
    learn_time_embedding=True,
    time_embedding_mix=0.7,
)
CLASSES = {"sd": StableDiffusionControlNetXSPipeline, "xl": StableDiffusionXLControlNetXSPipeline}
PROMPTS, NOISE = ["a red fox", "two blue cats"], np.random.default_rng(0).normal(size=(2, 8, 8, 4))
NOISE = NOISE.astype(np.float32)
FUSED = "UNetControlNetXSModel"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """{name: (theirs, directory of the base, of the adapter, of the whole)}."""
    made = {}

    def get(name):
        if name not in made:
            path, xl = tmp_path_factory.mktemp(name), name == "xl"
            base, stored = _theirs(path, xl, unet={"layers_per_block": 2})
            config = base.unet.config
            shared = ("cross_attention_dim", "down_block_types", "use_linear_projection")
            shared = {key: config[key] for key in shared}
            torch.manual_seed(1)
            adapter = perturb(ControlNetXSAdapter(**ADAPTER, **shared), 4, 0.05)
            adapter.save_pretrained(path / "adapter")
            extra = {} if xl else {"requires_safety_checker": False}
            parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
            whole = CLASSES[name](**parts, controlnet=adapter, **extra)
            whole.set_progress_bar_config(disable=True)
            whole.save_pretrained(path / "whole")
            made[name] = whole, stored, path / "adapter", path / "whole"
        return made[name]

    return get


def _drawn(pipe, ours, **kwargs):
    kwargs = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 7.5, **kwargs}
    image = tiny_sd.ramp()
    if ours:
        with jax.default_matmul_precision("highest"):
            return pipe(PROMPTS, image=image, latents=NOISE, **kwargs).images
    latents = torch.from_numpy(NOISE).permute(0, 3, 1, 2).contiguous()
    hint = torch.from_numpy(image).permute(2, 0, 1)[None]
    return pipe(PROMPTS, image=hint, latents=latents, **kwargs).images


def _opened(path):
    """Diffusers' pipeline of a directory."""
    pipe = StableDiffusionControlNetXSPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _agree(got, want):
    assert want.std() > 0.05
    assert np.abs(got - want).mean() <= 1e-4
    assert np.abs(got - want).max() <= 1e-3


@pytest.mark.parametrize("name", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_base_and_adapter(pipes, name):
    """With its time embedding learned, a scale of 0 is not the base in diffusers, and not here."""
    theirs, stored, adapter, _ = pipes(name)
    ours = load_pipeline(stored, control=Controller(*load_model(adapter), "diffusers"))
    found = []
    for some in (
        {},
        {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5},
        {"controlnet_conditioning_scale": 0.0},
        {"control_guidance_start": 0.9, "control_guidance_end": 0.95},  # no step lies within
    ):
        found.append(_drawn(theirs, False, **some))
        _agree(_drawn(ours, True, **some), found[-1])
    for i, one in enumerate(found):  # told apart by more than the tolerance
        assert all(np.abs(one - other).mean() > 1e-3 for other in found[:i])


@pytest.mark.parametrize(
    "name", ["dpmpp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("euler", "lcm"))]
)
def test_other_solvers(pipes, name, monkeypatch):
    """The controller acts on the first half of the rows: of each solver, those of diffusers."""
    theirs, stored, adapter, _ = pipes("sd")
    monkeypatch.setattr(theirs, "scheduler", SCHEDULERS[name].from_config(theirs.scheduler.config))
    ours = load_pipeline(stored, Controller(*load_model(adapter), "diffusers"), scheduler=name)
    assert ours.scheduler["_class_name"] == type(theirs.scheduler).__name__
    found = []
    for some in ({}, {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5}):
        _same_step_noise(monkeypatch, NOISE.shape[1:])  # of LCM, anew for every picture
        found.append(_drawn(theirs, False, **some))
        _agree(_drawn(ours, True, **some), found[-1])
    assert np.abs(found[0] - found[1]).mean() > 1e-3


@pytest.mark.slow
def test_directories_of_either_side(pipes, tmp_path):
    """Diffusers stores base and controller fused, and computes otherwise when it finds them so."""
    _, stored, _, whole = pipes("sd")
    ours = load_pipeline(whole)
    assert ours.controllers[0].compat == "diffusers_pretrained"
    fused = _drawn(_opened(whole), False)
    _agree(_drawn(ours, True), fused)
    for compat, kind in (("diffusers_pretrained", FUSED), ("diffusers", "UNet2DConditionModel")):
        pipe = ours.replace(control=Controller(*ours.controllers[0][:2], compat))
        again = tmp_path / compat
        save_pipeline(pipe, again)
        index = json.loads((again / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionControlNetXSPipeline"
        assert index["unet"] == ["diffusers", kind]
        theirs, back = _opened(again), load_pipeline(again)
        assert back.controllers[0].compat == compat
        _equal(theirs.unet.state_dict(), _opened(whole).unet.state_dict())
        _equal(theirs.controlnet.state_dict(), _opened(whole).controlnet.state_dict())
        want = _drawn(theirs, False)
        _agree(_drawn(back, True), want)
        if compat == "diffusers":  # told apart by more than the tolerance
            assert np.abs(want - fused).mean() > 1e-3
    one = load_pipeline(stored, control=whole / "unet").controllers[0]
    assert one.compat == "diffusers_pretrained"
    same = jax.tree.map(np.array_equal, one.params, ours.controllers[0].params)
    assert jax.tree.all(same)


def _equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_docs_name_every_argument_that_is_absent():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "port.md").read_text()
    section = text.split("## Arguments of diffusers that are absent")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {
        name: set(re.findall(r"`(\w+)`", " ".join(row for row in rows if xl or "(XL)" not in row)))
        for name, xl in (("sd", False), ("xl", True))
    }
    ours = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
    for name, theirs in CLASSES.items():
        calls = (inspect.signature(one.__call__).parameters for one in (theirs, ours[name]))
        wanted, there = (set(call) for call in calls)
        assert wanted - there == named[name]
