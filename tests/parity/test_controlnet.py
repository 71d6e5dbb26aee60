"""ControlNet against diffusers, float32, every parameter perturbed."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cnxs_jax import control, load_pipeline, save_pipeline, tree
from cnxs_jax.convert import families, rules, unet
from cnxs_jax.pipelines import load
from tests.parity import xs_models
from tests.parity.helpers import convert, nhwc, perturb, relative_error
from tests.parity.test_sd_pipeline import _theirs

pytestmark = pytest.mark.parity

HINT = {"conditioning_embedding_out_channels": (4, 6)}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """{case: (base, controlnet, their modules and parameters)}, through diffusers' own files."""
    found = {}

    def get(name):
        if name not in found:
            path, (base, _) = tmp_path_factory.mktemp(name), xs_models.make(name)
            copy = diffusers.ControlNetModel.from_unet(base, **HINT)
            copy, loaded = perturb(copy, seed=2), []
            for kind, model in (("base", base), ("control", copy)):
                model.save_pretrained(path / kind)
                loaded += load.load_model(path / kind)
            found[name] = (base, copy), loaded
        return found[name]

    return get


def controlled(base, copy, arguments, scale):
    """diffusers' pipelines: the copy's residuals are arguments of the base."""
    hint = arguments.pop("controlnet_cond")
    down, mid = copy(**arguments, controlnet_cond=hint, conditioning_scale=scale, return_dict=False)
    residuals = {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
    }
    return base(**arguments, **residuals).sample


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_forward_and_gradients(opened, name):
    models, loaded = opened(name)
    base, base_params, adapter, own = loaded
    module, params = control.attach(base, base_params, adapter, own)
    x, t, cond, arguments = xs_models.inputs(name)
    cond["control_scale"] = np.full(2, 0.8, np.float32)
    models[1].zero_grad()
    expected = controlled(*models, arguments, 0.8)
    expected.square().mean().backward()
    grads = tree.flatten(convert({k: p.grad for k, p in models[1].named_parameters()}))

    def loss(own):
        out = module.apply({"params": {**params, "control": own}}, x, t, cond)
        return jnp.square(out).mean(), out

    with jax.default_matmul_precision("highest"):
        found, out = jax.jit(jax.grad(loss, has_aux=True))(own)
    assert relative_error(out, nhwc(expected)) <= 1e-5
    found = tree.flatten(found)
    assert found.keys() == grads.keys()
    largest = max(np.abs(g).max() for g in grads.values())
    for key, g in grads.items():
        assert np.abs(found[key] - g).max() <= 1e-4 * max(np.abs(g).max(), 1e-3 * largest), key


def test_saved_by_us_opens_in_diffusers(opened, tmp_path):
    models, loaded = opened("sdxl")
    load.save_model(*loaded[2:], tmp_path)
    back, info = diffusers.ControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs, ours = models[1].state_dict(), back.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_published_sizes_have_diffusers_tensors(name):
    family = families.family_of({"_class_name": "ControlNetModel"}, "config")
    config = {k: v for k, v in unet.PUBLISHED[name].items() if k not in ("sample_size",)}
    config.pop("up_block_types", None)
    with torch.device("meta"):
        model = diffusers.ControlNetModel(**config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    _, target = families.build(family, config, "config")
    ours = {
        rules.keys_of(path, leaf.shape, unet.DIFFUSERS)[0]: rules.to_torch_shape(path, leaf.shape)
        for path, leaf in tree.flatten(target).items()
    }
    assert ours == expected


def test_directories_of_several_from_either_side(tmp_path):
    """diffusers' pipelines of several ControlNets: `controlnet`, `controlnet_1`, in their order."""
    base, _ = _theirs(tmp_path)
    nets = [diffusers.ControlNetModel.from_unet(base.unet, **HINT) for _ in range(2)]
    nets = [perturb(net, seed, 0.05) for seed, net in enumerate(nets, 2)]
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    kind = diffusers.StableDiffusionControlNetPipeline
    kind(**parts, controlnet=nets, requires_safety_checker=False).save_pretrained(tmp_path / "all")
    opened = load_pipeline(tmp_path / "all")
    assert len(opened.controllers) == 2
    for net, (_, params, _) in zip(nets, opened.controllers, strict=True):
        expected = {key: value.numpy() for key, value in net.state_dict().items()}
        tensors = rules.to_tensors(jax.tree.map(np.asarray, params))
        assert tensors.keys() == expected.keys()
        assert all(np.array_equal(tensors[key], expected[key]) for key in expected)
    save_pipeline(opened, tmp_path / "back")
    back = kind.from_pretrained(tmp_path / "back").controlnet
    assert len(back.nets) == 2
    for net, other in zip(nets, back.nets, strict=True):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())
