"""Stable Diffusion's pipelines: directories, text, guidance as an input, painted words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax.control import controlnet_xs
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import base
from tests.pipelines import tiny_sd

PROMPT = "a red fox and a boat"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("xl"), xl=True)


def test_a_config_names_one_side_or_two_or_none(tmp_path):
    """diffusers' `sample_size`: the size of pictures that a call names none for."""
    wide = tiny_sd.pipeline(tmp_path, sample_size=(6, 10))
    assert wide.sizes(None, None) == ((12, 20), (12, 20))
    assert wide.sizes(None, 16)[0] == (12, 16)
    cnxs_jax.save_pipeline(wide, tmp_path / "pipe")
    opened = cnxs_jax.load_pipeline(tmp_path / "pipe")
    assert opened.components["unet"].module.sample_size == (6, 10)
    assert opened.sizes(16, None)[0] == (16, 20)
    own = controlnet_xs.from_unet(wide.components["unet"].module, size_ratio=0.5)
    assert own.sample_size == (6, 10)
    with pytest.raises(ConfigError, match=r"names no sample_size(?s:.*)give both"):
        tiny_sd.pipeline(tmp_path, sample_size=None).sizes(16, None)
    assert tiny_sd.pipeline(tmp_path, sample_size=None).sizes(16, 24)[0] == (16, 24)


def _np(pipe, prompt=PROMPT, **kwargs):
    return pipe(prompt, **{"num_inference_steps": 2, "output_type": "latent", **kwargs}).images


def _request(pipe, prompts, negatives=None, guidance=7.5):
    return base.requests.check(prompts, negatives, 2, guidance, None, None, 1, 0, None, "np")


def test_sdxl_round_trip(xl, tmp_path):
    cnxs_jax.save_pipeline(xl, tmp_path / "pipe")
    opened = cnxs_jax.load_pipeline(tmp_path / "pipe")
    assert type(opened) is type(xl)
    assert opened.components.keys() == xl.components.keys()
    assert opened.option("force_zeros_for_empty_prompt") is True
    np.testing.assert_array_equal(_np(opened), _np(xl))


def test_sdxl_conditions(xl):
    cond = xl.encode(_request(xl, ["a boat", PROMPT]), (24, 16))
    assert cond["text"].shape == (2, 77, 16 + 24)
    assert cond["pooled"].shape == (2, 10)
    assert cond["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 2
    assert all(not value.any() for value in cond["null"].values())
    negative = xl.encode(_request(xl, ["a boat", PROMPT], ""), (24, 16))["null"]
    assert all(value.any() for value in negative.values())
    other = base.dataclasses.replace(xl, options={"force_zeros_for_empty_prompt": False})
    found = other.encode(_request(xl, ["a boat", PROMPT]), (24, 16))["null"]
    np.testing.assert_allclose(found["text"], negative["text"], atol=1e-6)


def test_guidance_may_be_an_input_of_the_network(tmp_path):
    lcm = tiny_sd.pipeline(tmp_path, time_cond_proj_dim=8)
    cond = lcm.encode(_request(lcm, [PROMPT], guidance=8.5), (16, 16))
    assert cond["guidance"].tolist() == [7.5]
    assert "null" not in cond
    assert lcm.replace(scheduler="lcm").defaults() == (4, 8.5)


def test_a_published_lcm_opens(tmp_path):
    """Its class in model_index.json is a pipeline of its own in diffusers."""
    made = tiny_sd.pipeline(tmp_path / "tokens", time_cond_proj_dim=8).replace(scheduler="lcm")
    cnxs_jax.save_pipeline(made, tmp_path / "lcm")
    file = tmp_path / "lcm" / "model_index.json"
    index = json.loads(file.read_text()) | {"_class_name": "LatentConsistencyModelPipeline"}
    file.write_text(json.dumps(index))
    opened = cnxs_jax.load_pipeline(tmp_path / "lcm")
    assert opened.defaults() == (4, 8.5)
    assert opened.components["unet"].module == made.components["unet"].module


def test_defaults_are_those_of_diffusers(pipe, xl):
    assert pipe.defaults() == (50, 7.5)
    assert xl.defaults() == (50, 5.0)
    assert pipe.replace(scheduler="lcm").defaults() == (4, 0.0)
    # Where a model's times start stays with another solver, as diffusers' `from_config` has it.
    assert pipe.replace(scheduler="ddim").scheduler["steps_offset"] == 1


def test_text_of_another_width_is_refused(pipe, xl):
    parts = pipe.components | {"unet": xl.components["unet"]}
    mixed = base.dataclasses.replace(pipe, components=parts)
    with pytest.raises(ConfigError, match="text of width 16, the UNet reads 40"):
        mixed.check()


def test_painted_words(pipe):
    left = np.zeros((8, 8), np.float32)
    left[:, :4] = 1.0
    plain = _np(pipe)
    # Where nothing is painted in the whole batch, the masks do not reach the network at all.
    np.testing.assert_array_equal(_np(pipe, word_masks={"red fox": 0 * left}), plain)
    np.testing.assert_array_equal(_np(pipe, word_masks={"red fox": (left, 0.0)}), plain)
    painted = _np(pipe, word_masks={"red fox": left, "a boat": 1 - left})
    swapped = _np(pipe, word_masks={"red fox": 1 - left, "a boat": left})
    assert np.abs(painted - plain).max() > 1e-3
    assert np.abs(painted - swapped).max() > 1e-3
    both = _np(pipe, [PROMPT, "a boat"], word_masks=[{"red fox": left, "a boat": 1 - left}, None])
    assert np.abs(both[0] - painted[0]).max() <= 1e-4 * np.abs(painted).max()
    # Beside a painted neighbour zeros do reach it, and change nothing: exactly what no masks give
    # there, and up to the rounding of another program what it is in a batch without any.
    pair = [PROMPT, "a boat"]
    zero = _np(pipe, pair, word_masks=[{"red fox": left}, {"a boat": 0 * left}])
    np.testing.assert_array_equal(zero, _np(pipe, pair, word_masks=[{"red fox": left}, None]))
    unpainted = _np(pipe, pair)
    assert np.abs(zero[1] - unpainted[1]).max() <= 1e-5 * np.abs(unpainted).max()
    one = [{"red fox": left}, {"a boat": left}]
    assert np.abs(_np(pipe, pair, word_masks=one)[1] - unpainted[1]).max() > 1e-3


def test_painted_words_under_control(pipe):
    left = np.zeros((8, 8), np.float32)
    left[:, :4] = 1.0
    words = {"word_masks": {"red fox": left}}
    controlled = pipe.replace(control=tiny_sd.xs_on(pipe.components["unet"].module))
    shown = {"image": tiny_sd.ramp()}
    painted = _np(controlled, **shown, **words)
    assert np.abs(painted - _np(controlled, **shown)).max() > 1e-3
    assert np.abs(painted - _np(pipe, **words)).max() > 1e-3
    off = _np(controlled, **shown, **words, controlnet_conditioning_scale=0.0)
    np.testing.assert_allclose(off, _np(pipe, **words), atol=1e-5)


def test_both_tokenizers_of_sdxl_share_one_context(xl):
    left = np.ones((4, 4), np.float32)
    request = base.dataclasses.replace(_request(xl, [PROMPT]), word_masks=[{"boat": left}])
    words, null = xl._words(request, (8, 8))
    assert words["word_mask"].shape == (1, 8, 8, 77)
    ids = xl.tokenizer[0](PROMPT)["input_ids"]
    boat = [n for n, i in enumerate(ids) if xl.tokenizer[0].decode([i]).strip() in "boat"][-4:]
    np.testing.assert_array_equal(np.flatnonzero(words["word_mask"][0, 0, 0]), boat)
    assert not null["word_weight"].any()
    assert jax.tree.all(jax.tree.map(lambda a: isinstance(a, jnp.ndarray), words))
