"""T5 encoder against transformers, float32, every parameter perturbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from cnxs_jax import tree
from cnxs_jax.models.t5 import T5Encoder
from tests.parity.helpers import convert, perturb, relative_error

pytestmark = pytest.mark.parity

CONFIGS = {
    "gated": dict(num_layers=3, num_heads=3, d_kv=8, d_ff=48, feed_forward_proj="gated-gelu"),
    "relu_few_buckets": dict(
        num_layers=2,
        num_heads=4,
        d_kv=16,
        d_ff=32,
        feed_forward_proj="relu",
        relative_attention_num_buckets=10,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-5,
    ),
}
BIAS = (
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias",
    "encoder.relative_attention_bias",
)


def pair(name):
    """(PyTorch model, module, converted parameters) of one config."""
    config = dict(vocab_size=101, d_model=32, **CONFIGS[name])
    torch.manual_seed(0)
    theirs = perturb(T5EncoderModel(T5Config(**config)))
    tensors = {k: v for k, v in theirs.state_dict().items() if "embed_tokens" not in k}
    return theirs, T5Encoder(**config), convert(tensors, ["encoder.block"], [BIAS])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 7, 300])
def test_encoder(name, length):
    theirs, module, params = pair(name)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 101, (4, length))
    # All real, a tail of padding, one real token, nothing real.
    mask = np.arange(length)[None] < np.array([[length], [length // 2 + 1], [1], [0]])
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = theirs(torch.tensor(ids), torch.tensor(mask.astype(np.int64))).last_hidden_state
        out = module.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    assert relative_error(out, expected.numpy()) <= 1e-5


def test_every_parameter_is_named_as_in_transformers():
    _, module, params = pair("gated")
    ids = jnp.zeros((1, 4), jnp.int32)
    ours = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    shapes = {k: v.shape for k, v in tree.flatten(ours).items()}
    assert shapes == {k: v.shape for k, v in tree.flatten(params).items()}


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (10, 20), (8, 64)])
def test_position_buckets(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    from cnxs_jax.models.t5 import position_buckets

    offset = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, distance).numpy()
    np.testing.assert_array_equal(position_buckets(600, buckets, distance), expected)
