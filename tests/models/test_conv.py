"""Convolution layers: custom gradients, doubled inputs, GroupNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import sharding
from cnxs_jax.models import conv
from tests.programs import exchanges


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(ours, theirs, tolerance):
    return np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("form", [conv.conv_by_products, conv.conv_as_one_product])
@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize(
    ("size", "padding"),
    [(3, conv.SAME3), (2, ((1, 0), (0, 1))), (3, ((0, 1), (2, 0))), (5, ((2, 2), (2, 2)))],
)
def test_values_and_gradients_are_those_of_the_plain_convolution(form, batch, size, padding):
    x, kernel = random(batch, 9, 7, 5), random(size, size, 5, 6, seed=1)
    target = random(*conv.plain(x, kernel, 1, padding).shape, seed=2)

    def gradients(convolution):
        return jax.jit(jax.grad(lambda x, k: (jnp.sin(convolution(x, k)) * target).sum(), (0, 1)))(
            x, kernel
        )

    with jax.default_matmul_precision("highest"):
        assert close(form(x, kernel, padding), conv.plain(x, kernel, 1, padding), 1e-5)
        ours = gradients(lambda x, k: form(x, k, padding))
        theirs = gradients(lambda x, k: conv.plain(x, k, 1, padding))
    assert close(ours[0], theirs[0], 1e-5)
    assert close(ours[1], theirs[1], 1e-5)


def test_the_form_is_chosen_by_pixels_and_channels():
    def form(batch, side, channels, size=3, strides=1):
        """What the program is made of."""
        x = jnp.zeros((batch, side, side, channels))
        kernel = jnp.zeros((size, size, channels, channels))
        program = str(jax.make_jaxpr(lambda x, k: conv.convolve(x, k, strides))(x, kernel))
        names = {"custom_vjp": "products", "dot_general": "one product"}
        return next((name for op, name in names.items() if op in program), "plain")

    here = jax.default_backend() == "cpu"
    assert form(1, 32, 16) == ("products" if here else "plain")
    assert form(2, 16, 512) == ("one product" if here else "plain")
    assert form(4, 16, 512) == form(1, 16, 16) == "plain"
    assert form(2, 16, 512, size=1) == form(2, 16, 512, strides=2) == "plain"


def test_devices_scan_their_own_images_for_the_kernel_gradient():
    """Two devices exchange their sums and no pictures, and find the gradient of one."""
    x, weight = (np.asarray(random(4, 32, 32, 16, seed=i)) for i in range(2))
    kernel = np.asarray(random(3, 3, 16, 16, seed=2))

    def loss(kernel, x, weight):
        return (conv.convolve(x, kernel) * weight).sum()

    alone = jax.jit(jax.grad(loss))(kernel, x, weight)
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        batch = sharding.put_batch({"x": x, "weight": weight}, mesh)
        placed = sharding.put(kernel, sharding.replicated(mesh)), batch["x"], batch["weight"]
        program = jax.jit(jax.grad(loss)).lower(*placed).compile()
    assert exchanges(program) == {"all-reduce"}
    assert close(program(*placed), alone, 1e-5)


def test_kernel_gradient_accumulates_in_float32():
    x = jnp.ones((2, 64, 64, 16), jnp.bfloat16)
    kernel = jnp.zeros((3, 3, 16, 16), jnp.bfloat16)
    grad = jax.grad(lambda k: conv.convolve(x, k).astype(jnp.float32).sum())(kernel)
    assert float(grad[1, 1, 0, 0]) == 2 * 64 * 64  # bfloat16 sums of ones stop at 256
    assert float(grad[0, 0, 0, 0]) == jnp.bfloat16(2 * 63 * 63)


def test_doubled_convolution_is_resize_then_convolution():
    x, kernel = random(2, 6, 5, 8), random(3, 3, 8, 4, seed=1)
    resized = jax.image.resize(x, (2, 12, 10, 8), "nearest")
    with jax.default_matmul_precision("highest"):
        expected = conv.plain(resized, kernel)
        assert close(conv.convolve_doubled(x, kernel), expected, 1e-5)


@pytest.mark.parametrize(("size", "strides", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_conv_has_the_parameters_and_output_of_linen(size, strides, padding):
    x = random(2, 9, 8, 5)
    theirs = nn.Conv(6, (size, size), strides, padding=padding)
    params = theirs.init(jax.random.key(0), x)
    ours = conv.Conv(6, size, strides)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, ours.init(jax.random.key(0), x)
    )
    assert close(ours.apply(params, x), theirs.apply(params, x), 1e-6)


def test_group_norm_survives_a_large_mean():
    x = 300 + random(2, 8, 6, 32)
    params = {"params": {"scale": random(32, seed=1), "bias": random(32, seed=2)}}
    ours = conv.GroupNorm(8, 1e-6).apply(params, x)
    reference = np.asarray(x, np.float64).reshape(2, 48, 8, 4)
    reference = reference - reference.mean((1, 3), keepdims=True)
    reference /= np.sqrt(np.square(reference).mean((1, 3), keepdims=True) + 1e-6)
    scale, bias = (np.asarray(params["params"][name]) for name in ("scale", "bias"))
    reference = reference.reshape(x.shape) * scale + bias
    assert close(np.asarray(ours, np.float64), reference, 1e-4)


@pytest.mark.parametrize(("mean", "tolerance"), [(0, 1e-5), (300, 1e-3)])
def test_group_norms_gradient_is_that_of_linens(mean, tolerance):
    """Of input, scale and bias; also where the mean is 300 times as large as what is left."""
    x, target = mean + random(3, 8, 6, 32), random(3, 8, 6, 32, seed=1)
    params = {"params": {"scale": random(32, seed=2), "bias": random(32, seed=3)}}

    def gradients(layer):
        return jax.grad(lambda p, x: (jnp.sin(layer.apply(p, x)) * target).sum(), (0, 1))(params, x)

    ours = gradients(conv.GroupNorm(8, 1e-6))
    theirs = gradients(nn.GroupNorm(8, epsilon=1e-6, use_fast_variance=False))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert close(a, b, tolerance)


def test_group_norm_of_half_precision_sums_in_float32():
    """The output has the layer's dtype, whatever the input's; so has the gradient the input's."""
    x, target = (300 + random(2, 16, 16, 8)).astype(jnp.bfloat16), random(2, 16, 16, 8, seed=1)
    params = {"params": {"scale": random(8, seed=2), "bias": random(8, seed=3)}}
    norm = conv.GroupNorm(2)

    def value_and_gradients(x):
        def loss(params, x):
            y = norm.apply(params, x)
            return (y * target).sum(), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, gradients

    y, (of_params, of_x) = value_and_gradients(x)
    exact, (of_params_exact, of_x_exact) = value_and_gradients(x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact)
    for a, b in zip(jax.tree.leaves(of_params), jax.tree.leaves(of_params_exact), strict=True):
        assert close(a, b, 1e-6)  # sums of 512 numbers in bfloat16 would be off by a hundredth
    np.testing.assert_array_equal(of_x, of_x_exact.astype(jnp.bfloat16))
    half = conv.GroupNorm(2, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half.apply(params, x), exact.astype(jnp.bfloat16))


def test_group_norms_gradient_keeps_the_input_alone():
    x, params = random(2, 6, 5, 8), {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}

    def kept(layer):
        """Number of arrays of the input's size that the gradient keeps."""
        residuals = jax.vjp(lambda x: layer.apply(params, x), x)[1]
        return sum(leaf.size == x.size for leaf in jax.tree.leaves(residuals))

    assert kept(conv.GroupNorm(2)) == 1
    assert kept(nn.GroupNorm(2, use_fast_variance=False)) > 1


def test_time_embedding_shifts_the_channels_of_a_resnet_block():
    block, x, temb = conv.ResnetBlock(12, 4), random(2, 5, 5, 8), random(2, 16, seed=1)
    params = block.init(jax.random.key(0), x, temb)["params"]
    assert params["time_emb_proj"]["kernel"].shape == (16, 12)
    with_one = block.apply({"params": params}, x, temb)
    other = block.apply({"params": params}, x, temb.at[0].add(1.0))
    assert not np.allclose(with_one[0], other[0])
    np.testing.assert_array_equal(with_one[1], other[1])
