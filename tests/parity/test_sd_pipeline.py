"""Stable Diffusion's pipelines against diffusers: same prompt and noise, same picture.

`pytest -m slow tests/parity/test_sd_pipeline.py` runs the rest: what compiles programs of its own.
"""

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import scheduling_lcm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from cnxs_jax import load_pipeline, save_pipeline
from cnxs_jax.pipelines import programs
from tests.parity.helpers import perturb
from tests.pipelines import tiny_sd

pytestmark = pytest.mark.parity

STEPS, PROMPTS, NEGATIVE = 4, ["a red fox", "two BLUE cats"], "a boat"
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}
GUIDED = {"guidance_scale": 7.5, "negative_prompt": [NEGATIVE] * 2}


def _text(kind, config, path, pad):
    words = tiny_sd.write_tokenizer(path, pad)
    ids = {"eos_token_id": words - 1, "bos_token_id": words - 2, "pad_token_id": words - 3}
    encoder = kind(CLIPTextConfig(vocab_size=words, **config, **ids))
    return CLIPTokenizer.from_pretrained(path), perturb(encoder, 1)


def _theirs(path, xl=False, scheduler=DDIMScheduler, unet=None, **schedule):
    """A random pipeline of diffusers, and the directory that it is stored in."""
    torch.manual_seed(0)
    kwargs = {k: v for k, v in tiny_sd.SCHEDULER.items() if k != "_class_name"}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2}
    blocks |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    config = (tiny_sd.XL if xl else tiny_sd.UNET) | (unet or {})
    tokenizer, encoder = _text(CLIPTextModel, tiny_sd.CLIP, path / "one", "<|endoftext|>")
    parts = {
        "unet": perturb(UNet2DConditionModel(**config), 3, 0.05),
        "vae": perturb(AutoencoderKL(**tiny_sd.VAE, **blocks), 2, 0.05),
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "scheduler": scheduler(**(kwargs | schedule)),
    }
    if xl:
        second = _text(CLIPTextModelWithProjection, tiny_sd.CLIP_2, path / "two", "!")
        parts |= {"tokenizer_2": second[0], "text_encoder_2": second[1]}
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path / "stored")
    return pipe, path / "stored"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """{name: (theirs, directory)}, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = _theirs(tmp_path_factory.mktemp(name), name == "xl")
        return made[name]

    return get


def _noise(height=8, width=8):
    return np.random.default_rng(0).standard_normal((2, height, width, 4)).astype(np.float32)


def _pictures(theirs, ours, noise, **kwargs):
    """(their pictures, ours) float [B,H,W,3]."""
    kwargs = {"num_inference_steps": STEPS, "output_type": "np", **kwargs}
    size = {"height": 2 * noise.shape[1], "width": 2 * noise.shape[2]}
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
    want = theirs(PROMPTS, latents=latents, **size, **kwargs).images
    with jax.default_matmul_precision("highest"):
        got = ours(PROMPTS, latents=noise, **size, **kwargs).images
    assert want.std() > 0.05
    assert np.abs(want[0] - want[1]).max() > 0.05
    return want, got


def _agree(want, got):
    assert np.abs(got - want).mean() <= 1e-4  # the demand is 1/255
    assert np.abs(got - want).max() <= 1e-3


def _same_step_noise(monkeypatch, shape):
    """Makes diffusers' LCM scheduler draw what our loop draws for seed 0."""
    _, keys = programs.draw(np.zeros(2, np.uint32), np.arange(2, dtype=np.uint32), shape)

    def at(row):
        draws = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, row), shape))(keys)
        return torch.from_numpy(np.array(draws)).permute(0, 3, 1, 2)

    rows = iter(range(STEPS))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: at(next(rows)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(pipes, name, monkeypatch):
    theirs, stored = pipes("sd")
    monkeypatch.setattr(theirs, "scheduler", SCHEDULERS[name].from_config(theirs.scheduler.config))
    _same_step_noise(monkeypatch, (8, 8, 4))
    _agree(*_pictures(theirs, load_pipeline(stored, scheduler=name), _noise(), **GUIDED))


def test_unguided(pipes):
    theirs, stored = pipes("sd")
    _agree(*_pictures(theirs, load_pipeline(stored), _noise(), guidance_scale=1.0))


@pytest.mark.slow
def test_a_wide_picture(pipes):
    theirs, stored = pipes("sd")
    _agree(*_pictures(theirs, load_pipeline(stored), _noise(4, 12), guidance_scale=1.0))


def test_the_empty_prompt(pipes):
    theirs, stored = pipes("sd")
    _agree(*_pictures(theirs, load_pipeline(stored), _noise()))


def test_v_prediction(tmp_path):
    theirs, stored = _theirs(tmp_path, prediction_type="v_prediction")
    want, got = _pictures(theirs, load_pipeline(stored), _noise(), **GUIDED)
    _agree(want, got)
    other = load_pipeline(stored, scheduler={"_class_name": "DDIMScheduler",
                                             "prediction_type": "epsilon"})  # fmt: skip
    assert np.abs(_pictures(theirs, other, _noise(), **GUIDED)[1] - want).mean() > 1e-2


@pytest.mark.parametrize("extra", [GUIDED, {}], ids=["negative", "zeros"])
def test_sdxl(pipes, extra, monkeypatch):
    theirs, stored = pipes("xl")
    euler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    monkeypatch.setattr(theirs, "scheduler", euler)
    _agree(*_pictures(theirs, load_pipeline(stored, scheduler="euler"), _noise(4, 8), **extra))


REFINER = tiny_sd.XL | dict(
    block_out_channels=(8, 12, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=24,
    transformer_layers_per_block=2,
    projection_class_embeddings_input_dim=10 + 5 * 6,
)


@pytest.fixture(scope="module")
def refiner(pipes, tmp_path_factory):
    """SDXL's second stage with the autoencoder and the larger text encoder of the first."""
    torch.manual_seed(1)
    first, path = pipes("xl")[0], tmp_path_factory.mktemp("refiner")
    shared = {name: getattr(first, name) for name in ("vae", "text_encoder_2", "tokenizer_2")}
    theirs = StableDiffusionXLImg2ImgPipeline(
        **shared, text_encoder=None, tokenizer=None, scheduler=first.scheduler,
        unet=perturb(UNet2DConditionModel(**REFINER), 4, 0.05), add_watermarker=False,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(path)
    return theirs, path


@pytest.mark.parametrize(
    ("kind", "end", "extra"),
    [
        (EulerDiscreteScheduler, 0.8, {}),
        (EulerDiscreteScheduler, 0.6, GUIDED | {"guidance_scale": 3.0}),
        (DDIMScheduler, 0.5, {"guidance_scale": 1.0}),
    ],
)
def test_sdxl_base_and_refiner(pipes, refiner, kind, end, extra, monkeypatch):
    (base_pipe, stored), (refine, second) = pipes("xl"), refiner
    steps, noise, seen = 10, _noise(), []
    for pipe in (base_pipe, refine):
        monkeypatch.setattr(pipe, "scheduler", kind.from_config(base_pipe.scheduler.config))
        unet = pipe.unet.forward
        monkeypatch.setattr(pipe.unet, "forward", lambda x, t, *args, unet=unet, **kwargs: (
            seen.append(int(t)), unet(x, t, *args, **kwargs))[1])  # fmt: skip
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
    how = {"num_inference_steps": steps, **extra}
    half = base_pipe(
        PROMPTS, latents=latents, height=16, width=16, denoising_end=end, output_type="latent",
        **how,
    ).images  # fmt: skip
    first = len(seen)
    how = {"guidance_scale": 5.0} | how
    want = refine(PROMPTS, image=half, denoising_start=end, output_type="np", **how).images
    below = round(1000 * (1 - end))
    assert min(seen[:first]) >= below > max(seen[first:])
    assert len(seen) == steps

    scheduler = {v: k for k, v in SCHEDULERS.items()}[kind]
    ours = load_pipeline(stored, scheduler=scheduler)
    both = ours.replace(experts=[{"below": below, "model": second}])
    calls = {"latents": noise, "output_type": "np", **how}
    with jax.default_matmul_precision("highest"):
        alone, got = (pipe(PROMPTS, **calls).images for pipe in (ours, both))
    assert np.abs(got - want).max() <= 1e-4
    assert np.abs(alone - want).max() > 1e-2  # the second network has its part in it


def test_diffusers_opens_the_refiner_that_we_save(refiner, tmp_path):
    theirs, stored = refiner
    save_pipeline(load_pipeline(stored), tmp_path / "again")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(opened) is StableDiffusionXLImg2ImgPipeline
    assert opened.text_encoder is None
    assert opened.config.requires_aesthetics_score is True
    assert opened.config.force_zeros_for_empty_prompt is False
    for part in ("unet", "text_encoder_2"):
        before, after = (getattr(p, part).state_dict() for p in (theirs, opened))
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_guidance_as_an_input_of_the_network(tmp_path, monkeypatch):
    theirs, stored = _theirs(tmp_path, unet={"time_cond_proj_dim": 8}, scheduler=LCMScheduler)
    _same_step_noise(monkeypatch, (8, 8, 4))
    ours = load_pipeline(stored)
    want, got = _pictures(theirs, ours, _noise(), guidance_scale=8.5)
    _agree(want, got)
    with jax.default_matmul_precision("highest"):
        plain = ours(PROMPTS, latents=_noise(), num_inference_steps=STEPS, output_type="np").images
    np.testing.assert_array_equal(plain, got)  # 8.5 is the default


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_diffusers_opens_what_we_save(pipes, tmp_path, name):
    theirs, stored = pipes(name)
    save_pipeline(load_pipeline(stored), tmp_path / "again")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(opened) is type(theirs)
    assert dict(opened.scheduler.config).items() >= tiny_sd.SCHEDULER.items() - {
        ("_class_name", "DDIMScheduler")
    }
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(theirs, part):
            before, after = (getattr(p, part).state_dict() for p in (theirs, opened))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
    for part in ("tokenizer", "tokenizer_2"):
        if hasattr(theirs, part):
            ids = [getattr(p, part)("a red fox", padding="max_length") for p in (theirs, opened)]
            assert ids[0]["input_ids"] == ids[1]["input_ids"]
    if name == "xl":
        assert opened.config.force_zeros_for_empty_prompt is True
