"""The whole pipeline against diffusers: same prompt and noise, same picture, both ways."""

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as published
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cnxs_jax import load_pipeline, save_pipeline
from cnxs_jax.pipelines import sizes
from tests.pipelines import tiny

pytestmark = pytest.mark.parity

SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# (ours by name or None for the stored one, theirs, steps, guidance)
CASES = {
    "stored": (None, DPMSolverMultistepScheduler, 7, 4.5),
    "dpmpp": ("dpmpp", DPMSolverMultistepScheduler, 20, 4.5),
    "ddim": ("ddim", DDIMScheduler, 10, 4.5),
    "ddim_unguided": ("ddim", DDIMScheduler, 4, 1.0),
    "lcm": ("lcm", LCMScheduler, 1, 4.5),
    "lcm_unguided": ("lcm", LCMScheduler, 1, 0.0),
}


def _perturb(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _diffusers_pipeline(directory, micro, sample_size=8):
    torch.manual_seed(0)
    tiny.tokenizer(directory / "tokenizer")
    tokenizer = T5Tokenizer.from_pretrained(directory / "tokenizer")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, sample_size=sample_size, use_additional_conditions=micro,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_perturb(T5EncoderModel(config), 1),
        vae=_perturb(vae, 2),
        transformer=_perturb(transformer, 3),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return _diffusers_pipeline(tmp_path_factory.mktemp("made"), micro=False)


@pytest.fixture(scope="module")
def stored(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    theirs.save_pretrained(directory)
    return directory


def _noise(batch, height=8, width=8):
    return np.random.default_rng(0).standard_normal((batch, height, width, 4)).astype(np.float32)


def _torch_images(pipe, prompts, noise, steps, guidance, **kwargs):
    height, width = (2 * side for side in noise.shape[1:3])
    out = pipe(
        prompts, latents=torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous(),
        num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        clean_caption=False, use_resolution_binning=False, height=height, width=width, **kwargs,
    )  # fmt: skip
    return out.images


def _our_images(pipe, prompts, noise, steps, guidance, **kwargs):
    height, width = (2 * side for side in noise.shape[1:3])
    with jax.default_matmul_precision("highest"):
        return pipe(
            prompts, latents=noise, num_inference_steps=steps, guidance_scale=guidance,
            output_type="np", height=height, width=width, **kwargs,
        ).images  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_picture_as_diffusers(theirs, stored, case):
    name, scheduler, steps, guidance = CASES[case]
    no_clip = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    theirs.scheduler = scheduler(**SCHEDULE, **no_clip)
    ours = load_pipeline(stored, scheduler=name)
    noise, prompts = _noise(2), ["a red fox", " Two BLUE cats "]
    want = _torch_images(theirs, prompts, noise, steps, guidance)
    got = _our_images(ours, prompts, noise, steps, guidance)
    assert want.std() > 0.05
    assert np.abs(want[0] - want[1]).max() > 0.05
    assert np.abs(got - want).max() <= 1e-4


def test_negative_prompt_and_wide_picture(theirs, stored):
    theirs.scheduler = DPMSolverMultistepScheduler(**SCHEDULE)
    noise = _noise(1, 8, 12)
    extra = {"negative_prompt": "a boat"}
    want = _torch_images(theirs, ["a red fox"], noise, 5, 3.0, **extra)
    got = _our_images(load_pipeline(stored), ["a red fox"], noise, 5, 3.0, **extra)
    assert np.abs(got - want).max() <= 1e-4
    other = _torch_images(theirs, ["a red fox"], noise, 5, 3.0)
    assert np.abs(other - want).max() > 1e-2


def test_micro_conditioning(tmp_path):
    # diffusers feeds size and aspect to models of latent side 128 only; ours to all that read them.
    theirs = _diffusers_pipeline(tmp_path, micro=True, sample_size=128)
    theirs.save_pretrained(tmp_path / "stored")
    noise = _noise(1, 8, 12)
    want = _torch_images(theirs, ["a red fox"], noise, 4, 4.5)
    got = _our_images(load_pipeline(tmp_path / "stored"), ["a red fox"], noise, 4, 4.5)
    assert np.abs(got - want).max() <= 1e-4


def test_sigma(theirs, stored, tmp_path):
    """Texts of up to 300 tokens; both directions."""
    theirs.scheduler = DPMSolverMultistepScheduler(**SCHEDULE)
    tokenizer = T5Tokenizer.from_pretrained(stored / "tokenizer", model_max_length=512)
    sigma = PixArtSigmaPipeline(**theirs.components | {"tokenizer": tokenizer})
    sigma.set_progress_bar_config(disable=True)
    sigma.save_pretrained(tmp_path / "stored")
    prompts, noise = ["a red fox " * 60, "two blue cats"], _noise(2)
    ours = load_pipeline(tmp_path / "stored")
    want = _torch_images(sigma, prompts, noise, 4, 4.5)
    assert np.abs(_our_images(ours, prompts, noise, 4, 4.5) - want).max() <= 1e-4
    cut = _torch_images(sigma, prompts, noise, 4, 4.5, max_sequence_length=120)
    assert np.abs(cut - want).max() > 1e-3
    save_pipeline(ours, tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is PixArtSigmaPipeline


@pytest.mark.parametrize("name", [None, "ddim", "lcm"])
def test_diffusers_opens_what_we_save(theirs, stored, tmp_path, name):
    ours = load_pipeline(stored, scheduler=name)
    save_pipeline(ours, tmp_path / "again")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(opened) is PixArtAlphaPipeline
    assert type(opened.scheduler).__name__ == ours.scheduler["_class_name"]
    opened.set_progress_bar_config(disable=True)
    steps = 1 if name == "lcm" else 6
    noise = _noise(1)
    got = _torch_images(opened, ["a red fox"], noise, steps, 4.5)
    assert np.abs(got - _our_images(ours, ["a red fox"], noise, steps, 4.5)).max() <= 1e-4
    for part in ("transformer", "vae", "text_encoder"):
        before, after = (getattr(p, part).state_dict() for p in (theirs, opened))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("side", "base"), [(128, "1024"), (64, "512"), (32, "256")])
def test_bins_are_the_published_ones(side, base):
    table = getattr(published, f"ASPECT_RATIO_{base}_BIN")
    want = {float(key): (int(h), int(w)) for key, (h, w) in table.items()}
    assert sizes.bins(side, 8) == want


@pytest.mark.parametrize(("height", "width"), [(40, 24), (33, 70), (32, 48), (90, 90)])
def test_resize_and_crop(height, width):
    images = np.random.default_rng(0).random((2, 32, 48, 3)).astype(np.float32)
    processor = published.PixArtImageProcessor
    want = processor.resize_and_crop_tensor(
        torch.from_numpy(images).permute(0, 3, 1, 2), width, height
    )
    got = np.asarray(sizes.resize_and_crop(images, height, width))
    assert np.abs(got - want.permute(0, 2, 3, 1).numpy()).max() <= 1e-5
