"""Experts of a pipeline: who draws which rows, with which texts, guidance and control."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import sharding
from cnxs_jax.diffusion import sampling
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.vae import AutoencoderKL
from cnxs_jax.pipelines import base, programs
from cnxs_jax.pipelines.control import Controller
from cnxs_jax.pipelines.interface import Component
from cnxs_jax.pipelines.load import save_model
from cnxs_jax.storage import ASSETS
from tests.pipelines import tiny, tiny_sd
from tests.pipelines.tiny import perturbed

STEPS, PROMPTS = 6, ["a red fox", "two blue cats"]


def latents(pipe, **given):
    """Latents [2,8,8,4] in `STEPS` steps."""
    return pipe(PROMPTS, num_inference_steps=STEPS, output_type="latent", **given).images


def other(pipe, seed=5, name=None):
    """The denoiser (or another component) of `pipe` with other weights."""
    module, params = pipe.components[name or pipe.denoiser]
    rng = np.random.default_rng(seed)
    return module, jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params
    )


def swapped(pipe, **components):
    """`pipe` with these components, `pipe.experts` gone."""
    return type(pipe)({**pipe.components, **components}, pipe.tokenizer, pipe.scheduler)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two stages of one PixArt: the directory of a pipeline, and of the other denoiser."""
    path = tmp_path_factory.mktemp("stages")
    first = tiny.pipeline(path / "tokenizer")
    cnxs_jax.save_pipeline(first, path / "first")
    save_model(*other(first), path / "second")
    return path


def test_copies_are_the_pipeline_bit_for_bit(sd):
    copies = [{"below": t, "model": tuple(sd.components["unet"])} for t in (200, 600)]
    both = sd.replace(experts=copies)
    table = base.ensembles.route(both.table(STEPS), both.experts)
    assert table.expert == (2, 2, 1, 1, 0, 0)  # t = 831, 665, 499, 333, 167, 1
    np.testing.assert_array_equal(latents(both), latents(sd))


def test_an_expert_owns_the_times_below_its_edge(sd):
    """Nothing of t = its edge, all of what is below: at the ends nothing or everything."""
    expert = Component(*other(sd))
    alone = latents(swapped(sd, unet=expert))
    times = np.asarray(sd.table(STEPS).t)

    def routed(below):
        return latents(sd.replace(experts=[{"below": below, "model": tuple(expert)}]))

    with pytest.warns(UserWarning, match="has none"):  # t is not below t
        np.testing.assert_array_equal(routed(float(times[-1])), latents(sd))
    np.testing.assert_array_equal(routed(float(times[0]) + 1), alone)
    last = routed(float(times[-1]) + 1)
    assert np.abs(last - latents(sd)).max() > 1e-3 < np.abs(last - alone).max()


def test_a_pipeline_brings_its_own_texts(sd):
    """Above all times it is that pipeline alone, which another text encoder makes another one."""
    refiner = swapped(sd, text_encoder=Component(*other(sd, name="text_encoder")))
    times = np.asarray(sd.table(STEPS).t)
    every = [{"below": float(times[0]) + 1, "model": refiner}]
    np.testing.assert_array_equal(latents(sd.replace(experts=every)), latents(refiner))
    assert np.abs(latents(refiner) - latents(sd)).max() > 1e-3


def test_guidance_of_its_own(sd, monkeypatch):
    """A scale of 1 leaves the unconditional half out of its rows, and of no others."""
    unet, table = tuple(sd.components["unet"]), sd.table(STEPS)
    below = float(np.asarray(table.t)[2])  # of the third row, which is not below it

    def routed(scale):
        expert = {"below": below, "model": unet, "guidance_scale": scale}
        return latents(sd.replace(experts=[expert]))

    found = {scale: routed(scale) for scale in (1.0, 3.0, sd.guidance_scale)}
    np.testing.assert_array_equal(found[sd.guidance_scale], latents(sd))
    off = table.with_guidance_off(0.0, float(np.asarray(table.sigma)[2]))
    assert off.guided == (True,) * 3 + (False,) * 3
    monkeypatch.setattr(type(sd), "table", lambda *_: off)
    np.testing.assert_allclose(found[1.0], latents(sd), atol=1e-6)
    assert np.abs(found[3.0] - found[1.0]).max() > 1e-3


@pytest.fixture(scope="module")
def controlled(sd):
    """ControlNet-XS on the pipeline."""
    return sd.replace(control=tiny_sd.xs_on(sd.components["unet"].module))


def test_control_ends_where_an_expert_has_none(controlled):
    unet = tuple(controlled.components["unet"])
    below = float(np.asarray(controlled.table(STEPS).t)[2])
    free = [{"below": below, "model": unet, "control": []}]
    picture = {"image": tiny_sd.ramp()}
    found = latents(controlled.replace(experts=free), **picture)
    ended = latents(controlled, control_guidance_end=0.5, **picture)
    np.testing.assert_allclose(found, ended, atol=1e-5)
    whole = latents(controlled, **picture)
    assert np.abs(found - whole).max() > 1e-3
    same = controlled.replace(experts=[{"below": below, "model": unet}])  # and this one has it
    np.testing.assert_array_equal(latents(same, **picture), whole)


def test_a_controller_of_its_own(controlled):
    unet, module = tuple(controlled.components["unet"]), controlled.components["unet"].module
    adapter = controlled.controllers[0].module
    second = (adapter, perturbed_adapter(adapter, module))
    below = float(np.asarray(controlled.table(STEPS).t)[0]) + 1
    owns = controlled.replace(experts=[{"below": below, "model": unet, "control": second}])
    picture = {"image": tiny_sd.ramp()}
    want = latents(controlled.replace(control=second), **picture)
    np.testing.assert_array_equal(latents(owns, **picture), want)
    assert np.abs(want - latents(controlled, **picture)).max() > 1e-4


def perturbed_adapter(adapter, module):
    """Other parameters of the adapter."""
    return perturbed(adapter, *adapter_inputs(module), seed=3)


def adapter_inputs(module):
    side = tiny_sd.SIDE
    x, hint = np.zeros((1, side // 2, side // 2, 4), "f4"), np.zeros((1, side, side, 3), "f4")
    return x, hint, np.zeros((1, 1, module.cross_attention_dim), "f4")


def test_two_stages_from_a_small_file(stored):
    """Paths are relative to the file; a denoiser alone shares T5 and autoencoder."""
    config = stored / "experts.json"
    config.write_text(json.dumps([{"below": 400, "model": "second"}]))
    pipe = cnxs_jax.load_pipeline(stored / "first", experts=config)
    by_hand = cnxs_jax.load_pipeline(stored / "first")
    second = cnxs_jax.load_model(stored / "second")
    by_hand = by_hand.replace(experts=[{"below": 400, "model": second}])
    found = latents(pipe)
    np.testing.assert_array_equal(found, latents(by_hand))
    alone = latents(by_hand.replace(experts=[]))
    assert np.abs(found - alone).max() > 1e-3
    result = pipe("a boat", num_inference_steps=STEPS)
    assert result.parameters[0]["experts"] == [{"below": 400.0, "model": str(stored / "second")}]
    # The denoiser of a whole pipeline alone: no second text encoder is loaded.
    part = {"below": 400, "model": str(stored / "whole"), "component": "transformer"}
    cnxs_jax.save_pipeline(whole(by_hand, second), stored / "whole")
    one = by_hand.replace(experts=[part])
    assert one.experts[0].pipe is None
    assert one.experts[0].entry == part
    np.testing.assert_array_equal(latents(one), found)


def whole(pipe, denoiser):
    """`pipe` with another denoiser in its place."""
    return swapped(pipe, transformer=Component(*denoiser))


def test_a_denoiser_brings_its_null_caption(stored, tmp_path):
    """Above all times it is the pipeline of that denoiser and that caption."""
    pipe = cnxs_jax.load_pipeline(stored / "first")
    null = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float32)
    save_model(*pipe.components["transformer"], tmp_path / "own", null_caption=null)
    every = pipe.replace(experts=[{"below": 999.5, "model": str(tmp_path / "own")}])
    first = pipe("a boat", num_inference_steps=1, output_type="latent").images
    found = every("a boat", num_inference_steps=1, output_type="latent").images
    want = dataclasses.replace(pipe, null_text=jnp.asarray(null))
    want = want("a boat", num_inference_steps=1, output_type="latent").images
    np.testing.assert_array_equal(found, want)
    assert np.abs(found - first).max() > 1e-3
    (tmp_path / "export").mkdir()  # and where its directory is all that there is
    (tmp_path / "own").rename(tmp_path / "export" / "transformer")
    (one,) = pipe.replace(experts=[{"below": 9, "model": str(tmp_path / "export")}]).experts
    np.testing.assert_array_equal(one.null_text, null)
    save_model(*pipe.components["transformer"], tmp_path / "wide", null_caption=np.ones((6, 17)))
    with pytest.raises(CheckpointError, match=r"null_caption is \[6, 17\](?s:.*)below 9"):
        pipe.replace(experts=[{"below": 9, "model": str(tmp_path / "wide")}])


def test_arrays_from_python_are_put_where_the_pipeline_is(stored):
    second = cnxs_jax.load_model(stored / "second")
    hosted = cnxs_jax.load_pipeline(stored / "first", offload="model")
    hosted = hosted.replace(experts=[{"below": 400, "model": second}])
    leaves = jax.tree.leaves(hosted.experts[0].denoiser.params)
    assert all(isinstance(x, np.ndarray) for x in leaves)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(second[1]))  # the caller's stay


def test_an_expert_without_a_step_is_told_and_costs_nothing(sd):
    routed = sd.replace(experts=[{"below": 1, "model": other(sd)}])  # t = 831, ..., 1
    with pytest.warns(UserWarning, match="the expert below 1 has none of the 6 steps"):
        np.testing.assert_array_equal(latents(routed), latents(sd))


def test_control_of_an_expert_follows_the_pipelines_computation(controlled, tmp_path):
    save_model(*controlled.controllers[0][:2], tmp_path / "xs")
    theirs = controlled.replace(
        control=Controller(*controlled.controllers[0][:2], "diffusers_pretrained")
    )
    expert = {"below": 400, "model": tuple(theirs.components["unet"]), "control": tmp_path / "xs"}
    (opened,) = theirs.replace(experts=[expert]).experts
    assert opened.controllers[0].compat == "diffusers_pretrained"
    (opened,) = controlled.replace(control=theirs.controllers[0], experts=[expert]).experts
    assert opened.controllers[0].compat == "diffusers_pretrained"


def test_sides_are_multiples_of_all(stored):
    pipe = cnxs_jax.load_pipeline(stored / "first")
    module = pipe.components["transformer"].module.clone(patch_size=4)
    cond = {"text": np.zeros((1, 4, 16), "f4"), "text_mask": np.ones((1, 4), np.int32)}
    coarse = module, perturbed(module, np.zeros((1, 8, 8, 4), "f4"), np.zeros(1, "f4"), cond)
    both = pipe.replace(experts=[{"below": 400, "model": coarse}])
    assert (pipe.multiple, both.multiple) == (4, 8)
    with pytest.raises(ConfigError, match="20 pixels is not a multiple of 8"):
        both("a boat", height=20, width=16)


def test_in_host_memory_one_of_them_is_on_the_device(stored, monkeypatch):
    experts = [{"below": 400, "model": str(stored / "second")}]
    resident = cnxs_jax.load_pipeline(stored / "first", experts=experts)
    hosted = cnxs_jax.load_pipeline(stored / "first", experts=experts, offload="model")
    assert all(
        isinstance(x, np.ndarray) for x in jax.tree.leaves(hosted.experts[0].denoiser.params)
    )
    loaded = []
    real = sampling.sample_from_host

    def watched(*args, **kwargs):
        return real(*args, load=lambda tree: loaded.append(1) or jax.device_put(tree), **kwargs)

    monkeypatch.setattr(sampling, "sample_from_host", watched)
    np.testing.assert_allclose(latents(hosted), latents(resident), atol=1e-5)
    assert len(loaded) == 2  # one switch


def test_on_a_mesh(stored):
    experts = [{"below": 400, "model": str(stored / "second")}]
    want = latents(cnxs_jax.load_pipeline(stored / "first", experts=experts))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = cnxs_jax.load_pipeline(stored / "first", experts=experts, mesh=mesh)
    leaves = jax.tree.leaves(split.experts[0].denoiser.params)
    assert any(len(x.sharding.device_set) == 8 for x in leaves)
    assert np.abs(latents(split) - want).max() <= 1e-5 * np.abs(want).max()


def test_painted_words_reach_the_experts(sd):
    """Each paints by its own tokens: above all times it is the other pipeline with the masks."""
    mask = np.zeros((16, 16), np.float32)
    mask[:, :8] = 1.0
    words = {"word_masks": [{"fox": (mask, 2.0)}, {"cats": (mask, 2.0)}]}
    refiner = swapped(sd, text_encoder=Component(*other(sd, name="text_encoder")))
    times = np.asarray(sd.table(STEPS).t)
    every = [{"below": float(times[0]) + 1, "model": refiner}]
    found = latents(sd.replace(experts=every), **words)
    np.testing.assert_array_equal(found, latents(refiner, **words))
    assert np.abs(found - latents(refiner)).max() > 1e-4


def test_seed_prompt_and_guidance_compile_nothing(sd):
    routed = sd.replace(experts=[{"below": 500, "model": other(sd)}])
    latents(routed)
    before = programs.denoise._cache_size()
    latents(routed, seed=9, guidance_scale=4.0)
    routed(["a boat", "a fox"], num_inference_steps=STEPS, output_type="latent")
    assert programs.denoise._cache_size() == before


def small(pipe, **fields):
    """A denoiser of `pipe`'s kind with other sizes."""
    module = pipe.components[pipe.denoiser].module.clone(**fields)
    cond = {"text": np.zeros((1, 4, module.cross_attention_dim), "f4")}
    x = np.zeros((1, 8, 8, module.in_channels), "f4")
    return module, perturbed(module, x, np.zeros(1, "f4"), cond)


BAD = {
    "not a list": (lambda pipe: {"below": 200}, "expected a list"),
    "no model": (lambda pipe: [{"below": 200}], "`model` is missing, there is below"),
    "a typo": (lambda pipe: [{"bellow": 200, "model": other(pipe)}], 'Did you mean "below"?'),
    "no number": (lambda pipe: [{"below": "x", "model": other(pipe)}], "expected a training time"),
    "no file": (lambda pipe: "nowhere.json", "there is no such file"),
    "too late": (lambda pipe: [{"below": 1000, "model": other(pipe)}], "between 0 and 1000"),
    "twice": (lambda pipe: [{"below": 9, "model": other(pipe)}] * 2, "two experts below 9"),
    "a number": (lambda pipe: [{"below": 9, "model": 3}], "a int is no expert"),
    "arrays alone": (lambda pipe: [{"model": other(pipe)}], "`below` is missing, there is model"),
    "an array": (lambda pipe: [{"below": 9, "model": np.zeros(3)}], "a ndarray is no expert"),
    "other parameters": (lambda pipe: [{"below": 9, "model": (other(pipe)[0], {})}],
                         "parameters do not fit the UNet"),
    "no hub of controllers": (lambda pipe: [{"below": 9, "model": other(pipe), "control": "a/b"}],
                              "there is nothing at 'a/b'"),
    "a fraction": (lambda pipe: [{"below": 0.2, "model": other(pipe)}],
                   "1000 * (1 - denoising_end): 800 for the part 0.2"),
    "huge": (lambda pipe: [{"below": 10**400, "model": other(pipe)}], "between 0 and 1000"),
    "nowhere": (lambda pipe: [{"below": 9, "model": "x" * 300}], "there is nothing at"),
    "no control": (lambda pipe: [{"below": 9, "model": other(pipe), "control": "nix"}],
                   "there is nothing at 'nix'"),
    "a cascade": (lambda pipe: [{"below": 9, "model": str(ASSETS / "ediffi_tiny"), "control": []}],
                  "a EDiffIPipeline is no expert"),
    "a component of arrays": (lambda pipe: [{"below": 9, "model": other(pipe),
                                             "component": "unet"}], "of a path or a hub id"),
    "an autoencoder": (lambda pipe: [{"below": 9, "model": tuple(pipe.components["vae"])}],
                       "a AutoencoderKL in the place of a UNet"),
    "wider text": (lambda pipe: [{"below": 9, "model": small(pipe, cross_attention_dim=24)}],
                   "the UNet reads 24"),
    "other latents": (lambda pipe: [{"below": 9, "model": small(pipe, in_channels=9)}],
                      "the latents of one autoencoder"),
    "other noise": (lambda pipe: [{"below": 9, "model": changed(pipe, beta_end=0.02)}],
                    "another noise schedule"),
    "other prediction": (lambda pipe: [{"below": 9, "model": changed(
        pipe, prediction_type="v_prediction")}], "it predicts v_prediction"),
    "other scale": (lambda pipe: [{"below": 9, "model": swapped(pipe, vae=Component(
        AutoencoderKL(**tiny_sd.VAE, scaling_factor=0.5), pipe.components["vae"].params))}],
        "scaling_factor of its autoencoder"),
    "nested": (lambda pipe: [{"below": 9, "model": pipe.replace(
        experts=[{"below": 5, "model": other(pipe)}])}], "experts of its own"),
    "more control": (lambda pipe: [{"below": 9, "model": other(pipe), "control": tiny_sd.xs_on(
        pipe.components["unet"].module)}], "the pipeline's read []"),
    "bad guidance": (lambda pipe: [{"below": 9, "model": other(pipe), "guidance_scale": -1}],
                     "expected a number of 0 or more"),
}  # fmt: skip


def changed(pipe, **scheduler):
    return type(pipe)(pipe.components, pipe.tokenizer, {**pipe.scheduler, **scheduler})


@pytest.mark.parametrize("case", BAD)
def test_one_message_for_what_does_not_fit(sd, case):
    make, message = BAD[case]
    with pytest.raises(ConfigError) as caught:
        sd.replace(experts=make(sd))
    assert message in str(caught.value)
    assert "expert" in str(caught.value.where) or case == "no file"
    assert len(str(caught.value)) < 500


def test_no_layout_holds_them(sd, tmp_path):
    with pytest.raises(ConfigError, match="no layout of experts"):
        cnxs_jax.save_pipeline(
            sd.replace(experts=[{"below": 9, "model": other(sd)}]), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_a_refiner_draws_nothing_alone(sd):
    from cnxs_jax.pipelines.stable_diffusion import StableDiffusionXLImg2ImgPipeline

    refiner = StableDiffusionXLImg2ImgPipeline(sd.components, sd.tokenizer, sd.scheduler)
    with pytest.raises(ConfigError, match="draws nothing alone"):
        refiner("a boat")
