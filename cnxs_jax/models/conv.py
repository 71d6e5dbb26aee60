"""Layers of the convolutional networks (VAE, UNets), NHWC, with diffusers' parameter names.

Parameters float32; norms computed in float32 with two passes; `dtype` is the compute dtype.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cnxs_jax import backend, sharding
from cnxs_jax.models.activations import silu
from cnxs_jax.models.parameters import parameter

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAME3 = ((1, 1), (1, 1))  # PyTorch's padding=1
HALF3 = ((0, 1), (0, 1))  # the VAE encoder pads only below and to the right before its stride 2

# Where XLA's own weight gradient on a CPU is slower than `_kernel_gradient` (measured on two x86
# cores, batch 16: 41 -> 18 ms at 64x64x32, 33 -> 14 at 32x32x64, but 7.6 -> 8.8 at 16x16x128).
MIN_PIXELS, MIN_CHANNELS, IMAGES_A_CHUNK = 32 * 32, 16, 2
# Where a convolution on a CPU is faster as one matrix product: few pixels in all, and a kernel
# larger than the picture (measured there with 1280 channels at 16x16 and at 8x8: forward 1.3 and
# 2.3 times as fast, the gradients of the input 2 and 4 times, of the kernel 1.3 and 1.6; level
# with 320 channels).
FEW_PIXELS, MANY_CHANNELS = 512, 512


def convolve(x, kernel, strides=1, padding=SAME3):
    """2-D convolution of [B,H,W,C] with a [h,w,C,O] kernel, fast to differentiate on a CPU too."""
    if strides != 1 or kernel.shape[:2] == (1, 1) or backend.current() != "cpu":
        return plain(x, kernel, strides, padding)
    batch, height, width, _ = x.shape
    channels = min(kernel.shape[2:])
    if batch * height * width <= FEW_PIXELS and channels >= MANY_CHANNELS:
        return conv_as_one_product(x, kernel, padding)
    if height * width >= MIN_PIXELS and channels >= MIN_CHANNELS:
        return conv_by_products(x, kernel, padding)
    return plain(x, kernel, 1, padding)


def plain(x, kernel, strides=1, padding=SAME3):
    """The same by XLA alone."""
    strides = (strides, strides)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def conv_as_one_product(x, kernel, padding=SAME3):
    """Convolution with stride 1: every pixel's neighbourhood in a row, times the kernel."""
    h, w, C, O = kernel.shape  # noqa: E741
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    B, H, W = x.shape[0], x.shape[1] - h + 1, x.shape[2] - w + 1
    taps = [x[:, i : i + H, j : j + W] for i in range(h) for j in range(w)]
    rows = jnp.concatenate(taps, -1).reshape(B * H * W, h * w * C)
    return (rows @ kernel.reshape(h * w * C, O)).reshape(B, H, W, O)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_by_products(x, kernel, padding=SAME3):
    """Convolution with stride 1 whose kernel gradient is matrix products."""
    return plain(x, kernel, 1, padding)


def _forward(x, kernel, padding):
    return plain(x, kernel, 1, padding), (x, kernel)


def _backward(padding, residuals, g):
    x, kernel = residuals
    full = tuple((n - 1 - a, n - 1 - b) for n, (a, b) in zip(kernel.shape, padding, strict=False))
    gx = plain(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2), 1, full)
    return gx, _kernel_gradient(x, g, kernel.shape, padding).astype(kernel.dtype)


conv_by_products.defvjp(_forward, _backward)


def _kernel_gradient(x, g, shape, padding):
    """d(loss)/d(kernel) [h,w,C,O], accumulated in float32 over chunks that stay in the cache.

    Row shifts are laid side by side in the columns of x and column shifts in those of g, so that
    one product of [h C, n] and [n, w O] holds all taps: for 3x3, 6 copies instead of im2col's 9,
    and a nearly square product. Each device scans the images that it holds: XLA would gather all
    of them for a scan over an axis that is spread.
    """
    h, w, C, O = shape  # noqa: E741
    B, H, W, _ = g.shape
    parts = sharding.row_parts(B)
    n = IMAGES_A_CHUNK if B // parts % IMAGES_A_CHUNK == 0 else 1

    def add_chunk(total, chunk):
        x, g = chunk
        x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
        g = jnp.pad(g, ((0, 0),) * 3 + ((w - 1, w - 1), (0, 0)))
        rows = jnp.concatenate([x[:, :, i : i + H] for i in range(h)], -1)
        columns = [g[:, :, :, w - 1 - j :][:, :, :, : W + w - 1] for j in range(w)]
        product = jnp.einsum(
            "pnc,pno->pco",
            rows.reshape(parts, -1, h * C),
            jnp.concatenate(columns, -1).reshape(parts, -1, w * O),
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    def chunked(a):  # [chunks, parts, n, H, W, C]
        return a.reshape(parts, -1, n, *a.shape[1:]).swapaxes(0, 1)

    start = jnp.zeros((parts, h * C, w * O), jnp.float32)
    total, _ = lax.scan(add_chunk, start, (chunked(x), chunked(g)))
    return total.sum(0).reshape(h, C, w, O).transpose(0, 2, 1, 3)


def convolve_doubled(x, kernel):
    """3x3 convolution of `x` with every pixel doubled in height and width: [B,2H,2W,O].

    A doubled neighbour is the same number twice, so each of the four output phases is a 2x2
    convolution of `x` itself with summed taps: 4/9 of the products (measured on a CPU, with
    gradients: 1.5 times faster).
    """
    B, H, W, _ = x.shape
    if backend.current() != "cpu":
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, x.shape[-1]))
        return convolve(doubled.reshape(B, 2 * H, 2 * W, -1), kernel)
    phases = [
        [convolve(x, columns, 1, ((1 - p, p), (1 - q, q))) for q, columns in _phases(rows, 1)]
        for p, rows in _phases(kernel, 0)
    ]
    out = jnp.stack([jnp.stack(row, 3) for row in phases], 2)  # [B,H,2,W,2,O]
    return out.reshape(B, 2 * H, 2 * W, -1)


def _phases(kernel, axis):
    """(phase, kernel with 2 taps on `axis`): an even output reads 1+2 taps, an odd one 2+1."""
    first, middle, last = jnp.split(kernel, 3, axis)
    even = jnp.concatenate([first, middle + last], axis)
    odd = jnp.concatenate([first + middle, last], axis)
    return enumerate((even, odd))


class Conv(nn.Module):
    """2-D convolution with bias; the parameters of `nn.Conv`, explicit padding as in PyTorch.

    `doubled`: of the input with every pixel doubled in height and width.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: tuple = SAME3
    dtype: jnp.dtype = jnp.float32
    doubled: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        padding = ((0, 0), (0, 0)) if self.kernel_size == 1 else self.padding
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias[None, None, None]))
        if self.doubled:
            return convolve_doubled(x, kernel) + bias
        return convolve(x, kernel, self.strides, padding) + bias


def _group_means(x, num_groups):
    """Means of [B,1,1,C] over the channels of a group, repeated for them."""
    B, _, _, C = x.shape
    means = x.reshape(B, 1, 1, num_groups, C // num_groups).mean(-1)
    return jnp.repeat(means, C // num_groups, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(x, scale, bias, num_groups, epsilon, dtype):
    """GroupNorm of [B,H,W,C], float32 inside, two passes; float32 scale and bias [1,1,1,C].

    Its gradient is written out: of arrays of that size it keeps `x` alone, where JAX's keeps the
    centred one and its double, and it sums over the pixels twice instead of three times.
    """
    return _group_norm_forward(x, scale, bias, num_groups, epsilon, dtype)[0]


def _group_norm_forward(x, scale, bias, num_groups, epsilon, dtype):
    h = x.astype(jnp.float32)
    mean = _group_means(h.mean((1, 2), keepdims=True), num_groups)
    h = h - mean
    variance = _group_means(jnp.square(h).mean((1, 2), keepdims=True), num_groups)
    inverse = lax.rsqrt(variance + epsilon)
    return (h * (inverse * scale) + bias).astype(dtype), (x, mean, inverse, scale)


def _group_norm_backward(num_groups, epsilon, dtype, residuals, g):
    x, mean, inverse, scale = residuals
    g = g.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    g_sum, g_normed_sum = (a.sum((1, 2), keepdims=True) for a in (g, g * normed))
    pixels = x.shape[1] * x.shape[2]
    g_mean, g_normed_mean = (
        _group_means(total * scale / pixels, num_groups) for total in (g_sum, g_normed_sum)
    )
    gx = inverse * (g * scale - g_mean - normed * g_normed_mean)
    return gx.astype(x.dtype), g_normed_sum.sum(0, keepdims=True), g_sum.sum(0, keepdims=True)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class GroupNorm(nn.Module):
    """GroupNorm over (H, W, channels of a group) of [B,H,W,C].

    Two passes in float32, like `nn.GroupNorm(use_fast_variance=False)`, whose reshape of the
    channels makes it half as fast on a CPU: here the sums run over H and W first.
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        scale, bias = (p.astype(jnp.float32)[None, None, None] for p in (scale, bias))
        return group_norm(x, scale, bias, self.num_groups, self.epsilon, self.dtype)


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, (+ time embedding), norm, SiLU, conv, + shortcut (`ResnetBlock2D`).

    `num_groups`: of both norms, or one number each.
    """

    features: int
    num_groups: int | tuple = 32
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, temb_BxE=None):
        both = self.num_groups
        groups = both if isinstance(both, tuple) else (both, both)

        def norm_silu_conv(i, h):
            h = GroupNorm(groups[i - 1], self.epsilon, self.dtype, name=f"norm{i}")(h)
            return Conv(self.features, dtype=self.dtype, name=f"conv{i}")(silu(h))

        h = norm_silu_conv(1, x)
        if temb_BxE is not None:
            project = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")
            h = h + project(silu(temb_BxE))[:, None, None]
        h = norm_silu_conv(2, h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """3x3 convolution with stride 2 (`Downsample2D`) to `features`, or to as many channels."""

    padding: tuple = SAME3
    dtype: jnp.dtype = jnp.float32
    features: int | None = None

    @nn.compact
    def __call__(self, x):
        features = self.features or x.shape[-1]
        conv = Conv(features, 3, 2, self.padding, self.dtype, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Each pixel twice in height and width, then a 3x3 convolution (`Upsample2D`).

    `size` (height, width), one pixel less at most: what the encoder had before it rounded up.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, size=None):
        B, H, W, C = x.shape
        if size is None or tuple(size) == (2 * H, 2 * W):
            return Conv(C, dtype=self.dtype, doubled=True, name="conv")(x)
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C))
        doubled = doubled.reshape(B, 2 * H, 2 * W, C)[:, : size[0], : size[1]]
        return Conv(C, dtype=self.dtype, name="conv")(doubled)
