"""int8 text encoders: the error of a weight, of an encoder, of a block of the published width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import tree
from cnxs_jax.convert import families, quantize, rules, t5
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.t5 import T5Block, T5Encoder

# Relative root mean square error of an encoder's output, with weights as T5 draws them: attention
# that is much sharper than that multiplies the errors of its logits.
BOUND = 0.02
IDS = np.random.default_rng(1).integers(0, 90, (3, 20))
MASK = (np.arange(20)[None] < np.array([[20], [11], [1]])).astype(np.int32)


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def test_no_weight_moves_by_more_than_half_a_unit():
    kernel = np.random.default_rng(0).standard_normal((3, 50, 7)).astype(np.float32)
    kernel[..., 2] *= 1e-4  # a quiet channel keeps its digits
    kernel[..., 3] = 0.0
    whole, scale = quantize.quantize(kernel)
    assert (whole.dtype, scale.shape) == (np.int8, (3, 1, 7))
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    assert np.all(np.abs(whole * scale - kernel) <= largest / 254 * (1 + 1e-5))
    assert np.abs(whole).max() == 127
    np.testing.assert_array_equal((whole * scale)[..., 3], 0.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """`(directory, module, params)` of a small encoder."""
    module = T5Encoder(vocab_size=90, d_model=96, d_kv=16, d_ff=192, num_layers=4, num_heads=6)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    directory = tmp_path_factory.mktemp("t5") / "text_encoder"
    from cnxs_jax.pipelines.load import save_model

    save_model(module, params, directory)
    return directory, module, params


def encode(module, params):
    out = module.apply({"params": params}, jnp.asarray(IDS), jnp.asarray(MASK))
    return np.asarray(out)[MASK > 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_encoder_gives_nearly_the_same_text(stored, dtype):
    directory, module, params = stored
    small, weights = cnxs_jax.load_model(directory, dtype=dtype, quantize="int8")
    expected, found = encode(module, params), encode(small, weights)
    assert 1e-4 < rms(found - expected) / rms(expected) < BOUND
    flat = tree.flatten(weights)
    kernels = [path for path in flat if path.endswith("/kernel")]
    assert len(kernels) == 7
    assert {str(flat[path].dtype) for path in kernels} == {"int8"}
    assert str(flat["shared/embedding"].dtype) == dtype
    shapes = {k: (v.shape, str(v.dtype)) for k, v in tree.flatten(families.shapes(small)).items()}
    held = {k: (v.shape, str(v.dtype)) for k, v in flat.items()}
    if dtype == "float32":
        assert held == shapes


def test_reading_never_holds_a_floating_model(stored, monkeypatch):
    """Each floating kernel is one tensor of one layer; the stacks are int8 from the start."""
    directory, _, _ = stored
    seen, real = [], quantize.quantize

    def watched(kernel):
        seen.append(kernel.ndim)
        return real(kernel)

    monkeypatch.setattr(quantize, "quantize", watched)
    cnxs_jax.load_model(directory, quantize="int8")
    assert seen == [2] * (7 * 4)


def test_what_has_no_int8_form_is_named(stored, tmp_path):
    directory, module, params = stored
    with pytest.raises(ConfigError, match='Did you mean "int8"'):
        cnxs_jax.load_model(directory, quantize="int4")
    with pytest.raises(ConfigError, match="AutoencoderKL has no int8 form"):
        quantize.quantized(families.FAMILIES[1].load()(), "int8")
    small, weights = cnxs_jax.load_model(directory, quantize="int8")
    from cnxs_jax.pipelines.load import save_model

    with pytest.raises(ConfigError, match="no place in this layout"):
        save_model(small, weights, tmp_path / "int8")
    tensors = rules.to_tensors(params, t5.TRANSFORMERS)
    tensors.pop("encoder.block.2.layer.1.DenseReluDense.wo.weight")
    with pytest.raises(CheckpointError, match="1 missing tensors"):
        quantize.to_params(
            tensors,
            families.shapes(module),
            families.shapes(small),
            t5.TRANSFORMERS,
            "t5",
            np.float32,
        )


@pytest.mark.slow
def test_one_block_of_the_published_width():
    """T5-XXL's: 4096 wide, 64 heads, 10240 in the feed-forward; the same bound."""
    sizes = 64, 64, 10240, "gated-gelu", 1e-6, jnp.bfloat16
    block, small = T5Block(*sizes), T5Block(*sizes, "int8")
    x = jax.random.normal(jax.random.key(0), (1, 8, 4096))
    rest = jnp.zeros((1, 64, 8, 8)), jnp.ones((1, 8), jnp.int32)
    shapes = tree.flatten(jax.eval_shape(block.init, jax.random.key(0), x, *rest)["params"])
    params, halved = {}, {}
    for n, (path, leaf) in enumerate(shapes.items()):
        value = jax.random.normal(jax.random.key(n), leaf.shape, jnp.bfloat16)
        if leaf.ndim == 1:
            params[path] = halved[path] = 1 + 0.1 * value
            continue
        # T5 folds 1/sqrt(d_kv) into its queries
        fan = leaf.shape[0] * (64 if "/q/" in path else 1)
        params[path] = value * fan**-0.5
        halved[path], halved[f"{path}_scale"] = quantize.quantize(params[path])
    run = {}
    for name, module, flat in (("float", block, params), ("int8", small, halved)):
        out, _ = jax.jit(module.apply)({"params": tree.unflatten(flat)}, x, *rest)
        run[name] = np.asarray(out - x)
    assert 1e-3 < rms(run["int8"] - run["float"]) / rms(run["float"]) < BOUND
