"""Layers of the convolutional networks (VAE, UNets), NHWC, with diffusers' parameter names.

Parameters float32; norms computed in float32 with two passes; `dtype` is the compute dtype.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAME3 = ((1, 1), (1, 1))  # PyTorch's padding=1
HALF3 = ((0, 1), (0, 1))  # the VAE encoder pads only below and to the right before its stride 2

# Where XLA's own weight gradient on a CPU is slower than `_kernel_gradient` (measured on two x86
# cores, batch 16: 41 -> 18 ms at 64x64x32, 33 -> 14 at 32x32x64, but 7.6 -> 8.8 at 16x16x128).
MIN_PIXELS, MIN_CHANNELS, IMAGES_A_CHUNK = 32 * 32, 16, 2


def convolve(x, kernel, strides=1, padding=SAME3):
    """2-D convolution of [B,H,W,C] with a [h,w,C,O] kernel, fast to differentiate on a CPU too."""
    h, w, C, O = kernel.shape  # noqa: E741
    same = (h, w) == (3, 3) and strides == 1 and padding == SAME3
    large = x.shape[1] * x.shape[2] >= MIN_PIXELS and min(C, O) >= MIN_CHANNELS
    if same and large and jax.default_backend() == "cpu":
        return conv3x3(x, kernel)
    return _convolve(x, kernel, strides, padding)


def _convolve(x, kernel, strides=1, padding=SAME3):
    strides = (strides, strides)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


@jax.custom_vjp
def conv3x3(x, kernel):
    """3x3 convolution, stride 1, padding 1, whose kernel gradient is matrix products."""
    return _convolve(x, kernel)


def _forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    gx = _convolve(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    return gx, _kernel_gradient(x, g).astype(kernel.dtype)


conv3x3.defvjp(_forward, _backward)


def _kernel_gradient(x, g):
    """d(loss)/d(kernel) [3,3,C,O], accumulated in float32 over chunks that stay in the cache.

    Row shifts are laid side by side in the columns of x and column shifts in those of g, so that
    one product of [3C, n] and [n, 3O] holds all nine taps: 6 copies instead of im2col's 9, and a
    nearly square product.
    """
    B, H, W, C = x.shape
    O = g.shape[-1]  # noqa: E741
    n = IMAGES_A_CHUNK if B % IMAGES_A_CHUNK == 0 else 1

    def add_chunk(total, chunk):
        x, g = chunk
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        g = jnp.pad(g, ((0, 0), (0, 0), (2, 2), (0, 0)))
        rows = jnp.concatenate([x[:, i : i + H] for i in range(3)], -1)
        columns = jnp.concatenate([g[:, :, 2 - j : W + 4 - j] for j in range(3)], -1)
        product = jnp.einsum(
            "nc,no->co",
            rows.reshape(-1, 3 * C),
            columns.reshape(-1, 3 * O),
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    chunks = (x.reshape(B // n, n, H, W, C), g.reshape(B // n, n, H, W, O))
    total, _ = lax.scan(add_chunk, jnp.zeros((3 * C, 3 * O), jnp.float32), chunks)
    return total.reshape(3, C, 3, O).transpose(0, 2, 1, 3)


class Conv(nn.Module):
    """2-D convolution with bias; the parameters of `nn.Conv`, explicit padding as in PyTorch."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: tuple = SAME3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padding = ((0, 0), (0, 0)) if self.kernel_size == 1 else self.padding
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return convolve(x, kernel, self.strides, padding) + bias


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
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        h = x.astype(jnp.float32)
        h = h - self._group_mean(h)
        inverse = lax.rsqrt(self._group_mean(jnp.square(h)) + self.epsilon)
        return (h * (inverse * scale.astype(jnp.float32)) + bias).astype(self.dtype)

    def _group_mean(self, x):
        """Means of the groups, repeated for their channels: [B,1,1,C]."""
        B, _, _, C = x.shape
        mean = x.mean((1, 2)).reshape(B, self.num_groups, C // self.num_groups).mean(-1)
        return jnp.repeat(mean, C // self.num_groups, axis=-1)[:, None, None]


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, (+ time embedding), norm, SiLU, conv, + shortcut (`ResnetBlock2D`)."""

    features: int
    num_groups: int = 32
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, temb_BxE=None):
        def norm_silu_conv(i, h):
            h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name=f"norm{i}")(h)
            return Conv(self.features, dtype=self.dtype, name=f"conv{i}")(nn.silu(h))

        h = norm_silu_conv(1, x)
        if temb_BxE is not None:
            project = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")
            h = h + project(nn.silu(temb_BxE))[:, None, None]
        h = norm_silu_conv(2, h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """3x3 convolution with stride 2 (`Downsample2D`)."""

    padding: tuple = SAME3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = Conv(x.shape[-1], 3, 2, self.padding, self.dtype, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Each pixel twice in height and width, then a 3x3 convolution (`Upsample2D`)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C))
        return Conv(C, dtype=self.dtype, name="conv")(x.reshape(B, 2 * H, 2 * W, C))
