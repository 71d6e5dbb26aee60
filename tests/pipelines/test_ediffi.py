"""The cascade of random networks: stored and opened, batches, painted words, style, mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import sharding
from cnxs_jax.diffusion import expert_tree, sampling
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from cnxs_jax.models.conditioning import Encoders
from cnxs_jax.models.pixel_unet import PixelUNet
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.cascade import Sampler, Stage
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:caption has")

CLIP = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
UNET = {
    "block_out_channels": (8,), "layers_per_block": (1,), "self_attention": (True,),
    "cross_attention": (True,), "attention_head_dim": 8, "cross_attention_dim": 8,
    "norm_num_groups": 4,
}  # fmt: skip
STAGE = UNET | {"efficient": True, "self_attention": (False,), "low_res_channels": 3}
EXPERTS = expert_tree.cover([(5, 31)])  # of the three noise levels, the first is its own
FOX = np.zeros((8, 8), np.float32)
FOX[:, :4] = 1.0
STYLE = np.random.default_rng(7).integers(0, 256, (12, 12, 3), np.uint8)


def encoders(vocabulary):
    t5 = T5Encoder(vocab_size=vocabulary, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    text = CLIPTextModelWithProjection(
        vocab_size=vocabulary, projection_dim=6, max_position_embeddings=10, eos_token_id=1, **CLIP
    )
    image = CLIPVisionModelWithProjection(image_size=8, patch_size=4, projection_dim=7, **CLIP)
    ids = jnp.ones((1, 4), jnp.int32)
    params = {
        "text": tiny.perturbed(t5, ids, ids),
        "clip_text": tiny.perturbed(text, ids),
        "clip_image": tiny.perturbed(image, jnp.zeros((1, 8, 8, 3))),
    }
    return Encoders(t5, text, image), params


def network(fields, size, made, seed):
    module = PixelUNet(**fields, **made.widths())
    cond = {"low_res": jnp.zeros((1, size // 2, size // 2, 3))} if "efficient" in fields else {}
    args = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), cond)
    return Component(module, tiny.perturbed(module, *args, seed=seed))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokens"))
    made, params = encoders(len(tokenizer))
    how = Sampler(steps=3, guidance_scale=2.0)
    experts = tuple(network(UNET, 8, made, seed) for seed in (0, 1))
    base = Stage("base", 8, experts, EXPERTS, sampler=how)
    how = Sampler("dpmpp", steps=2, guidance_scale=1.0, threshold=None, noise_level=0.1)
    second = Stage("sr16", 16, (network(STAGE, 16, made, 2),), sampler=how)
    tokens = {"text": tokenizer, "clip_text": tokenizer}
    limits = {"text": 8, "clip_text": 8}
    return EDiffIPipeline((base, second), made, params, tokens, limits)


@pytest.fixture(scope="module")
def base(pipe):
    """The first stage alone."""
    return dataclasses.replace(pipe, stages=pipe.stages[:1])


def drawn(pipe, prompt="a red fox", **options):
    return pipe(prompt, output_type="latent", **options).images


@pytest.fixture(scope="module")
def plain(base):
    return drawn(base)


def test_it_is_stored_and_opened_by_the_usual_names(pipe, tmp_path):
    cnxs_jax.save_pipeline(pipe, tmp_path / "cascade")
    index = json.loads((tmp_path / "cascade" / "model_index.json").read_text())
    assert index["stages"] == ["base", "sr16"]
    again = cnxs_jax.load_pipeline(tmp_path / "cascade")
    assert [s.settings() for s in again.stages] == [s.settings() for s in pipe.stages]
    result = pipe(["a red fox", "a boat"], output_type="np")
    assert result.images.shape == (2, 16, 16, 3)
    assert result.parameters[1]["prompt"] == "a boat"
    assert result.parameters[1]["steps"] == [3, 2]
    np.testing.assert_array_equal(again(["a red fox", "a boat"], output_type="np").images,
                                  result.images)  # fmt: skip
    # The second of two pictures is the one that its own seed draws.
    alone = pipe("a boat", seed=[(0, 1)], output_type="np").images
    np.testing.assert_allclose(alone[0], result.images[1], atol=1e-5)
    (tmp_path / "cascade" / "base" / "stage.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no settings of a stage"):
        cnxs_jax.load_pipeline(tmp_path / "cascade")
    with pytest.raises(ConfigError, match="scheduler"):
        cnxs_jax.load_pipeline(tmp_path / "cascade", scheduler="lcm")


def test_encoders_may_lie_in_neighbouring_directories(pipe, tmp_path):
    cnxs_jax.save_pipeline(pipe, tmp_path / "cascade")
    (tmp_path / "words").mkdir()
    for name in ("clip_text_encoder", "clip_image_encoder", "clip_tokenizer"):
        (tmp_path / "cascade" / name).rename(tmp_path / "words" / name)
    index = json.loads((tmp_path / "cascade" / "model_index.json").read_text())

    def opened(**beside):
        changed = json.dumps(index | {"encoders_beside": beside})
        (tmp_path / "cascade" / "model_index.json").write_text(changed)
        return cnxs_jax.load_pipeline(tmp_path / "cascade")

    again = opened(clip_text="words", clip_image="words")
    np.testing.assert_array_equal(drawn(again), drawn(pipe))
    with pytest.raises(CheckpointError, match="no text_encoder, which"):
        opened(text="words")
    for name in ("../words", "/etc", "a/b", 3, ""):
        with pytest.raises(CheckpointError, match="no name of a neighbouring directory"):
            opened(clip_text=name)
    with pytest.raises(CheckpointError, match="expected names of directories"):
        opened(clip="words")  # no encoder's name


@pytest.fixture(scope="module")
def stored(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "cascade"
    cnxs_jax.save_pipeline(pipe, path)
    return path


def test_one_expert_at_a_time_comes_from_host_memory(pipe, stored, monkeypatch):
    hosted = cnxs_jax.load_pipeline(stored, offload="model")
    params = [expert.params for stage in hosted.stages for expert in stage.experts]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    loads, real = [], sampling.sample_from_host

    def watched(*args, **kwargs):
        return real(*args, load=lambda tree: loads.append(1) or jax.device_put(tree), **kwargs)

    monkeypatch.setattr(sampling, "sample_from_host", watched)
    np.testing.assert_allclose(drawn(hosted), drawn(pipe), atol=1e-4)
    assert len(loads) == 3  # the base's two, then the second stage's one
    with pytest.raises(ConfigError, match="not streamed"):
        cnxs_jax.load_pipeline(stored, offload="sequential")


def test_a_mesh_draws_the_same_pictures(pipe, stored):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = cnxs_jax.load_pipeline(stored, mesh=mesh)
    prompts = ["a red fox", "a boat", "two blue cats"]  # which the mesh does not divide
    options = {"style_image": STYLE, "style_scale": 1.5, "word_masks": {}}
    got = drawn(split, prompts, **options)
    np.testing.assert_allclose(got, drawn(pipe, prompts, **options), atol=1e-4)


def test_each_noise_level_runs_its_expert(base, plain):
    first = base.stages[0]
    same = dataclasses.replace(first, experts=(first.experts[1],) * 2)
    other = drawn(dataclasses.replace(base, stages=(same,)))
    assert np.abs(other - plain).max() > 1e-3


def test_the_second_stage_reads_the_first_and_its_noise_level(pipe):
    want = drawn(pipe)
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 3))
    assert np.abs(drawn(pipe, latents=noise) - want).max() > 1e-3
    how = dataclasses.replace(pipe.stages[1].sampler, noise_level=0.5)
    louder = dataclasses.replace(pipe.stages[1], sampler=how)
    other = dataclasses.replace(pipe, stages=(pipe.stages[0], louder))
    assert np.abs(drawn(other) - want).max() > 1e-3


def test_painted_words_move_the_picture_and_zero_masks_do_not(base, plain):
    nothing = drawn(base, word_masks={"fox": 0 * FOX})
    np.testing.assert_array_equal(nothing, plain)
    left = drawn(base, word_masks={"fox": (FOX, 40.0)})
    right = drawn(base, word_masks={"fox": (1 - FOX, 40.0)})
    assert min(np.abs(left - plain).max(), np.abs(left - right).max()) > 1e-4
    with pytest.raises(ConfigError, match="'cat' is not in the prompt"):
        drawn(base, word_masks={"cat": FOX})


def test_a_reference_picture_is_a_style_with_a_weight_of_its_own(base, plain):
    styled = drawn(base, style_image=STYLE)
    assert np.abs(styled - plain).max() > 1e-4
    assert np.abs(drawn(base, style_image=255 - STYLE) - styled).max() > 1e-4
    # Without weight the text alone guides; with the text's own weight both do.
    np.testing.assert_allclose(drawn(base, style_image=STYLE, style_scale=0.0), plain, atol=1e-4)
    both = drawn(base, style_image=STYLE, style_scale=2.0)
    np.testing.assert_allclose(both, styled, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 32}, "draws 16 px"),
        ({"style_scale": 2.0}, "needs a style_image"),
        ({"style_image": STYLE, "style_scale": "much"}, "number of 0 or more, got 'much'"),
        ({"style_image": [STYLE] * 2}, "2 pictures for 1 prompts"),
        ({"num_inference_steps": [2, 2, 2]}, "3 values for 2 stages"),
        ({"guidance_scale": -1.0}, "0 or more"),
        ({"latents": np.zeros((1, 4, 4, 3))}, r"expected \[1,8,8,3\]"),
        ({"image": STYLE}, "without a controller"),
        ({"word_masks": [{}, {}]}, "2 sets of masks for 1 prompts"),
    ],
)
def test_mistakes_are_refused(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe("a red fox", **options)


@pytest.mark.parametrize(
    ("solver", "order", "message"),
    [
        ("dies", 2, 'Did you mean "deis"'),
        (["deis"], 2, "unknown solver"),
        ("deis", 4, "unknown order 4"),
        ("deis", "3", "unknown order '3'"),
        ("ab", [3], "unknown order"),
    ],
)
def test_samplers_that_are_none_are_named(solver, order, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(solver, order=order).table()
