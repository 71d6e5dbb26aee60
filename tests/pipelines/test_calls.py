"""The pipeline: a picture depends on its seed and prompt only; programs and arrays are shared."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import storage
from cnxs_jax.errors import ConfigError, NumericsError
from cnxs_jax.pipelines import base, programs
from tests.pipelines import tiny

PROMPTS = ["a red fox", "two blue cats", "a boat"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the sampling loop is traced, starting from empty caches."""
    counted = []
    inner = programs.sampling.sample

    def count(*args, **kwargs):
        counted.append(1)
        return inner(*args, **kwargs)

    programs.denoise.clear_cache()
    monkeypatch.setattr(programs.sampling, "sample", count)
    yield counted
    programs.denoise.clear_cache()


def _np(pipe, *args, **kwargs):
    return pipe(*args, **{"num_inference_steps": 3, "output_type": "np", **kwargs}).images


def test_output_types_agree(pipe):
    array = _np(pipe, PROMPTS[:2])
    assert array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32
    assert array.std() > 0.05
    pil = pipe(PROMPTS[:2], num_inference_steps=3).images
    assert np.abs(np.stack([np.asarray(p) for p in pil]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    assert _np(pipe, PROMPTS[:2], output_type="latent").shape == (2, 8, 8, 4)


@pytest.mark.parametrize("scheduler", ["dpmpp", "lcm", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(pipe, scheduler):
    pipe = pipe.replace(scheduler=scheduler)
    three = _np(pipe, PROMPTS, seed=7)
    assert np.abs(three[0] - three[1]).max() > 0.05
    for n, prompt in enumerate(PROMPTS):
        alone = _np(pipe, prompt, seed=[(7, n)])
        np.testing.assert_allclose(alone[0], three[n], atol=2e-6)
    np.testing.assert_allclose(_np(pipe, PROMPTS[0], seed=7)[0], three[0], atol=2e-6)


def test_a_list_of_seeds_draws_the_first_image_of_each(pipe):
    both = _np(pipe, "a boat", num_images_per_prompt=2, seed=[3, 4])
    for n, seed in enumerate((3, 4)):
        np.testing.assert_allclose(both[n], _np(pipe, "a boat", seed=seed)[0], atol=2e-6)
    assert np.abs(both[0] - both[1]).max() > 0.05


def test_images_of_a_prompt_are_neighbours(pipe):
    result = pipe(PROMPTS[:2], num_images_per_prompt=2, num_inference_steps=2, seed=5)
    assert [p["prompt"] for p in result.parameters] == [PROMPTS[i] for i in (0, 0, 1, 1)]
    again = result.parameters[3]
    alone = pipe(again["prompt"], num_inference_steps=2, seed=[(again["seed"], again["index"])])
    difference = np.asarray(alone.images[0], int) - np.asarray(result.images[3], int)
    assert np.abs(difference).max() <= 1


def test_only_the_signature_compiles(pipe, traces):
    _np(pipe, "a boat")
    assert len(traces) == 1
    _np(pipe, "a red fox", seed=8)
    _np(pipe, "a red fox", guidance_scale=2.0)
    _np(pipe, "a red fox", negative_prompt="two blue cats")
    _np(pipe.replace(scheduler={**tiny.SCHEDULER, "use_karras_sigmas": True}), "a boat")
    assert len(traces) == 1
    _np(pipe, "a boat", guidance_scale=1.0)  # no unconditional half
    assert len(traces) == 2
    _np(pipe, "a boat", num_inference_steps=4)
    assert len(traces) == 3
    _np(pipe, "a boat", height=24)
    assert len(traces) == 4


def test_replace_shares_arrays_and_changes_the_solver(pipe):
    other = pipe.replace(scheduler="lcm")
    ours, theirs = jax.tree.leaves(pipe.components), jax.tree.leaves(other.components)
    assert [id(x) for x in ours] == [id(x) for x in theirs]
    assert pipe.scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert other.scheduler["_class_name"] == "LCMScheduler"
    assert other.scheduler["beta_schedule"] == "linear"
    made = other("a boat").parameters[0]
    assert (made["steps"], made["guidance"]) == (4, 0.0)
    assert pipe("a boat").parameters[0]["steps"] == 20


def test_guidance_one_is_the_conditional_model(pipe):
    plain = _np(pipe, "a boat", guidance_scale=1.0, output_type="latent")
    same = _np(pipe, "a boat", guidance_scale=0.0, output_type="latent")
    np.testing.assert_array_equal(plain, same)
    near = _np(pipe, "a boat", guidance_scale=1.0 + 1e-6, output_type="latent")
    np.testing.assert_allclose(near, plain, rtol=1e-3, atol=1e-4)
    strong = _np(pipe, "a boat", guidance_scale=6.0, output_type="latent")
    assert np.abs(strong - plain).max() > 1e-2


def test_guidance_towards_the_prompt_itself_changes_nothing(pipe):
    plain = _np(pipe, "a boat", guidance_scale=1.0, output_type="latent")
    same = _np(pipe, "a boat", negative_prompt="a boat", guidance_scale=5.0, output_type="latent")
    np.testing.assert_allclose(same, plain, rtol=0, atol=2e-6 * np.abs(plain).max())


def test_learned_null_caption_keeps_the_mask_of_the_prompt(pipe, tmp_path):
    null = jax.random.normal(jax.random.key(5), (24, 16))
    learned = tiny.pipeline(tmp_path, null_text=null)
    request = _request(learned, "a red fox")
    cond = learned.encode(request, (16, 16))
    assert list(cond["null"]) == ["text"]
    np.testing.assert_array_equal(cond["null"]["text"][0], null)
    assert cond["text"].shape == (1, 24, 16)
    # Rows of the null caption behind the prompt's own length are never seen.
    used = int(cond["text_mask"].sum())
    assert 1 < used < 24
    changed = tiny.pipeline(tmp_path, null_text=null.at[used:].set(99.0))
    np.testing.assert_allclose(_np(learned, "a red fox"), _np(changed, "a red fox"), atol=1e-6)
    seen = tiny.pipeline(tmp_path, null_text=null.at[used - 1].set(9.0))
    assert np.abs(_np(learned, "a red fox") - _np(seen, "a red fox")).max() > 1e-3


def test_without_a_null_caption_the_empty_prompt_has_its_own_mask(pipe):
    null = pipe.encode(_request(pipe, "a red fox"), (16, 16))["null"]
    assert null["text_mask"].sum() == 1  # the end token


def _request(pipe, prompt):
    return base.requests.check(prompt, None, 3, 4.5, None, None, 1, 0, None, "np")


def test_micro_conditioning_reaches_the_network(tmp_path):
    pipe = tiny.pipeline(tmp_path, use_additional_conditions=True)
    cond = pipe.encode(_request(pipe, ["a boat", "a red fox"]), (24, 16))
    assert cond["size"].tolist() == [[24.0, 16.0]] * 2
    assert cond["aspect"].tolist() == [[1.5]] * 2
    assert _np(pipe, "a boat", height=24).shape == (1, 24, 16, 3)


def test_latents_replace_the_seed(pipe):
    noise = np.asarray(jax.random.normal(jax.random.key(1), (1, 8, 8, 4)))
    one = _np(pipe, "a boat", latents=noise, seed=1)
    np.testing.assert_array_equal(one, _np(pipe, "a boat", latents=noise, seed=2))


def test_nan_is_an_error_before_it_turns_black(pipe):
    vae = pipe.components["vae"]
    broken = jax.tree.map(lambda x: x * jnp.nan, vae.params)
    components = {**pipe.components, "vae": base.Component(vae.module, broken)}
    with pytest.raises(NumericsError, match=r"images \[0, 1\] of 2 are not finite"):
        _np(base.dataclasses.replace(pipe, components=components), PROMPTS[:2])


def test_text_that_does_not_fit_is_named(pipe):
    words = " ".join(["a boat"] * 70 + ["two blue cats"])
    with pytest.warns(UserWarning, match="two blue cats"):
        _np(pipe, words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _np(pipe, "")  # unconditional, and finite


BAD = [
    ({"height": 17}, "height", "16 and 20"),
    ({"width": 2}, "width", "4 and 8"),
    ({"image": np.zeros((16, 16, 3))}, "image", "without a controller"),
    ({"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale", "no effect"),
    ({"control_guidance_end": 0.5}, "control_guidance_end", "no effect"),
    ({"word_masks": {"a cat": np.ones((4, 4))}}, "word_masks", "not in the prompt"),
    ({"word_masks": [{}, {}]}, "word_masks", "2 sets of masks for 1 prompts"),
    ({"word_masks": "a boat"}, "word_masks", "expected a dict"),
    ({"style_scale": 1.0}, "style_scale", "no effect"),
    ({"latents": np.zeros((1, 4, 8, 8))}, "latents", r"\[1,8,8,4\]"),
    ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000"),
]


@pytest.mark.parametrize(("arguments", "where", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_calls_stop_before_any_network_runs(pipe, monkeypatch, arguments, where, message):
    for name in ("denoise", "decode", "draw"):
        monkeypatch.setattr(programs, name, None)
    with pytest.raises(ConfigError, match=message) as caught:
        pipe("a boat", **arguments)
    assert caught.value.where == where


def test_too_many_lcm_steps(pipe):
    with pytest.raises(ConfigError, match="50"):
        pipe.replace(scheduler="lcm")("a boat", num_inference_steps=51)


@pytest.mark.parametrize("scheduler", ["dmpp", 3, {}, {"_class_name": "PNDMScheduler"}])
def test_unknown_schedulers(pipe, scheduler):
    with pytest.raises(ConfigError):
        pipe.replace(scheduler=scheduler)


def test_a_part_that_the_family_does_not_take():
    with pytest.raises(ConfigError, match="takes no `experts`"):
        cnxs_jax.load_pipeline(storage.ASSETS / "ediffi_tiny", experts=[])
