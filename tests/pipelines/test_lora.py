"""LoRA adapters of a pipeline: merged, exchanged, weighed, taken off; files of both kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import lora, tree
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart
from cnxs_jax.convert import unet as unets
from cnxs_jax.errors import CheckpointError, ConfigError
from tests.pipelines import tiny, tiny_sd

CONVOLUTIONS = (r".*/(to_q|to_out_0)/kernel", r".*/resnets_0/conv1/kernel")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("tokens"))


def adapter(params, targets=lora.ATTENTION_TARGETS, seed=0, rank=2):
    """A tree whose factors are all filled."""
    rng = np.random.default_rng(seed)
    fresh = lora.init(params, targets, rank, jax.random.key(0), alpha=3.0)
    return tree.map_with_path(
        lambda p, v: v if p.endswith("scale") else jnp.asarray(rng.normal(size=v.shape), v.dtype),
        fresh,
    )


def weights(pipe):
    return tree.flatten(pipe.components[pipe.denoiser].params)


def same(found, expected, atol=1e-6):
    found, expected = (v if isinstance(v, dict) else tree.flatten(v) for v in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=atol, err_msg=name)


def test_adapters_are_merged_exchanged_and_taken_off(pipe):
    plain = pipe.components["transformer"].params
    one, two = adapter(plain, seed=1), adapter(plain, seed=2, rank=3)
    first = pipe.replace(lora=one)
    same(weights(first), tree.flatten(lora.merge(plain, one)))
    both = first.replace(lora=[(one, 0.7), (two, -0.3)])  # instead of the first, not beside it
    same(weights(both), tree.flatten(lora.merge(plain, [one, two], [0.7, -0.3])))
    lcm = both.replace(scheduler="lcm")  # what is not named stays
    assert weights(lcm) is not None
    same(weights(lcm), weights(both), atol=0)
    off = both.replace(lora=[])
    assert all(a is b for a, b in zip(*(weights(p).values() for p in (off, pipe)), strict=True))
    untouched = "transformer_blocks/ff/net_2/kernel"
    assert weights(both)[untouched] is weights(pipe)[untouched]


def test_pictures_are_those_of_the_merged_weights(pipe):
    plain = pipe.components["transformer"].params
    own = adapter(plain)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    found = pipe.replace(lora=own)("a boat", **options).images
    by_hand = {**pipe.components, "transformer": pipe.components["transformer"]._replace(
        params=lora.merge(plain, own))}  # fmt: skip
    expected = type(pipe)(by_hand, pipe.tokenizer, pipe.scheduler)("a boat", **options).images
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - pipe("a boat", **options).images).max() > 1e-2


@pytest.mark.parametrize("name", ["lora.safetensors", "peft"])
def test_files_are_opened_with_the_pipeline(pipe, tmp_path, name):
    cnxs_jax.save_pipeline(pipe, tmp_path / "pipe")
    plain = pipe.components["transformer"].params
    own = adapter(plain)
    lora_files.save(own, tmp_path / name, pixart.DIFFUSERS)
    found = cnxs_jax.load_pipeline(tmp_path / "pipe", lora=(tmp_path / name, 0.5))
    same(weights(found), tree.flatten(lora.merge(plain, own, 0.5)))
    cnxs_jax.save_pipeline(found, tmp_path / "merged")
    again = cnxs_jax.load_pipeline(tmp_path / "merged")
    same(weights(again), weights(found), atol=0)


def test_a_unet_offloaded_to_the_host(tmp_path):
    """Convolutions, too; what lay on the host stays there."""
    pipe = tiny_sd.pipeline(tmp_path / "tokens")
    cnxs_jax.save_pipeline(pipe, tmp_path / "pipe")
    plain = pipe.components["unet"].params
    own = adapter(plain, CONVOLUTIONS)
    lora_files.save(own, tmp_path / "lora.safetensors", unets.DIFFUSERS, "unet")
    options = {"lora": str(tmp_path / "lora.safetensors"), "offload": "model"}
    found = cnxs_jax.load_pipeline(tmp_path / "pipe", **options)
    same(weights(found), tree.flatten(lora.merge(plain, own)))
    assert not any(isinstance(leaf, jax.Array) for leaf in weights(found).values())


@pytest.mark.parametrize("given", [3, [None], ({}, "x"), ({}, True), ("x", 1.0, 2.0)])
def test_what_is_no_adapter_is_named(pipe, given):
    with pytest.raises(ConfigError) as caught:
        pipe.replace(lora=given)
    assert caught.value.where == "lora"


def test_adapters_of_another_network_are_refused(pipe, tmp_path):
    with pytest.raises(CheckpointError, match="no such LoRA file"):
        pipe.replace(lora=tmp_path / "nowhere.safetensors")
    other = {"unknown": {"kernel": jnp.zeros((4, 4))}}
    fresh = lora.init(other, ".*", 2, jax.random.key(0))
    with pytest.raises(ConfigError, match="no unknown/kernel"):
        pipe.replace(lora=fresh)
