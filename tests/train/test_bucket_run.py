"""A run over 40 aspect ratios: every program is compiled in the first pass and never again."""

import jax
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
from cnxs_jax import sharding
from cnxs_jax.data import buckets
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.vae import AutoencoderKL
from cnxs_jax.pipelines.base import Component
from tests import checks
from tests.pipelines import tiny
from tests.train.test_control_tasks import lora_config
from train import loop

pytestmark = pytest.mark.filterwarnings("ignore:caption has")
SHAPES = tuple(buckets.table(256).values())


@pytest.fixture
def base(tmp_path):
    """A random pipeline with a VAE of 8 pixels a latent and micro-conditioning, as the XL's."""
    made = tiny.pipeline(tmp_path / "tokens")
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    dit = PixArt(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, sample_size=32, use_additional_conditions=True,
    )  # fmt: skip
    zeros = jax.numpy.zeros
    cond = {"text": zeros((1, 4, 16)), "text_mask": zeros((1, 4), "int32")}
    cond |= {"size": zeros((1, 2)), "aspect": zeros((1, 1))}
    networks = {
        "vae": (vae, (zeros((1, 16, 16, 3)),)),
        "transformer": (dit, (zeros((1, 32, 32, 4)), zeros((1,)), cond)),
    }
    parts = {n: Component(net, tiny.perturbed(net, *args)) for n, (net, args) in networks.items()}
    components = {**made.components, **parts}
    pipe = type(made)(components, made.tokenizer, made.scheduler)
    cnxs_jax.save_pipeline(pipe, tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def photos(tmp_path):
    """Two pictures in each of the 40 shapes."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for n, (height, width) in enumerate(SHAPES * 2):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{n:02}.png")
        (tmp_path / "photos" / f"{n:02}.txt").write_text("a boat")
    return tmp_path / "photos"


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_pass(base, photos, tmp_path):
    """Encoders and step: 40 programs each. Every shape has come once an epoch, none twice."""
    config = lora_config(base)
    config.batch_size = 2
    config.data.update(source="image_folder", root=str(photos), size=256, buckets=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        fit = loop.Fit(config, loop.build_task(config), mesh, tmp_path)
        fit.state = fit.fresh()
        counts = []
        for number in range(2):
            seen = set()
            for step in range(len(SHAPES)):
                batch = fit.batch(number * len(SHAPES) + step)
                seen.add(batch["x"].shape[1:3])
                fit.state, metrics = fit.step(fit.state, fit.frozen, batch, fit.key_step)
                assert bool(metrics["finite"])
            assert seen == {(h // 8, w // 8) for h, w in SHAPES}
            assert fit.task.loader.epoch == number
            counts.append((fit.encode._cache_size(), fit.step._cache_size()))
    checks.record("40 aspect ratios", encoders=counts[1][0], steps=counts[1][1])
    assert counts == [(40, 40), (40, 40)]
