"""ControlNet-XS against diffusers' fused model, and against the original network's arithmetic.

Float32, every parameter perturbed, zero convolutions and norms too. The original network is here
diffusers' with its norms corrected; `test_controlnet_xs_original` runs the original code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cnxs_jax import control, tree
from cnxs_jax.convert import controlnet_xs_fused as fused_layout
from cnxs_jax.convert import rules
from cnxs_jax.pipelines import load
from tests.parity import xs_models
from tests.parity.helpers import convert, nhwc, relative_error

pytestmark = pytest.mark.parity

COMPATS = ("official", "diffusers", "diffusers_pretrained")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """{case: (base, adapter, their modules and parameters)}, through diffusers' own files."""
    found = {}

    def get(name):
        if name not in found:
            path, models = tmp_path_factory.mktemp(name), xs_models.make(name)
            loaded = []
            for kind, model in zip(("base", "adapter"), models, strict=True):
                model.save_pretrained(path / kind)
                loaded += load.load_model(path / kind)
            found[name] = models, loaded
        return found[name]

    return get


def attached(loaded, compat):
    base, base_params, adapter, params = loaded
    return control.attach(base, base_params, adapter, params, compat)


@pytest.mark.parametrize("name", xs_models.CASES)
@pytest.mark.parametrize("compat", COMPATS)
def test_forward(opened, name, compat):
    """At a scale of 0.8, which counts as part of the mix in the original."""
    models, loaded = opened(name)
    module, params = attached(loaded, compat)
    x, t, cond, arguments = xs_models.inputs(name)
    cond["control_scale"] = np.full(2, 0.8, np.float32)
    fused = xs_models.fuse(*models, compat)
    if compat == "official":
        fused.register_to_config(time_embedding_mix=0.8 * fused.config.time_embedding_mix)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = nhwc(fused(**arguments, conditioning_scale=0.8).sample)
        out = jax.jit(module.apply)({"params": params}, x, t, cond)
        others = [nhwc(xs_models.fuse(*models, c)(**arguments).sample) for c in COMPATS]
    assert relative_error(out, expected) <= 1e-5
    # The three are told apart by more than the tolerance.
    pairs = [(a, b) for i, a in enumerate(others) for b in others[:i]]
    assert all(relative_error(a, b) > 1e-4 for a, b in pairs)


@pytest.mark.parametrize("compat", [pytest.param("diffusers", marks=pytest.mark.slow), "official"])
def test_gradients_of_the_adapter(opened, compat):
    models, loaded = opened("sdxl")
    module, params = attached(loaded, compat)
    x, t, cond, arguments = xs_models.inputs("sdxl")
    fused = xs_models.fuse(*models, compat)
    fused.freeze_unet_params()
    fused(**arguments).sample.square().mean().backward()
    grads = {k: p.grad for k, p in fused.named_parameters() if p.grad is not None}
    expected = tree.flatten(convert(adapter_names(grads)))

    def loss(own):
        out = module.apply({"params": {**params, "control": own}}, x, t, cond)
        return jnp.square(out).mean()

    with jax.default_matmul_precision("highest"):
        found = tree.flatten(jax.jit(jax.grad(loss))(params["control"]))
    assert found.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for key, g in expected.items():
        assert np.abs(found[key] - g).max() <= 1e-4 * max(np.abs(g).max(), 1e-3 * largest), key


def adapter_names(gradients):
    """The trained tensors of a fused model, which are the adapter's, under the adapter's names."""
    problems = rules.Problems("gradients")
    named, unknown = rules.to_diffusers(gradients, fused_layout.TABLES["controlnet"], problems)
    assert not unknown
    return {key: tensor for key, (_, tensor) in named.items()}


def test_no_control_is_the_base_and_a_scale_of_zero_is_not(opened):
    """With a learned time embedding, which reaches the base, too."""
    models, loaded = opened("sdxl")
    module, params = attached(loaded, "diffusers")
    x, t, cond, arguments = xs_models.inputs("sdxl")
    fused = xs_models.fuse(*models, "diffusers")
    run = jax.jit(lambda cond: module.apply({"params": params}, x, t, cond))
    off = {"control_scale": np.zeros(2, np.float32), "control_active": np.zeros(2, np.float32)}
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        base = nhwc(fused(**arguments, apply_control=False).sample)
        zero = nhwc(fused(**arguments, conditioning_scale=0.0).sample)
        none, ours = run(cond | off), run(cond | off | {"control_active": np.ones(2, "f4")})
    assert relative_error(none, base) <= 1e-5
    assert relative_error(ours, zero) <= 1e-5
    assert relative_error(zero, base) > 1e-2
