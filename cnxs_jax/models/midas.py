"""MiDaS's depth network DPT-hybrid (arXiv 2103.13413; MiDaS: arXiv 1907.01341), for inference.

BiT's ResNet (arXiv 1912.11370) makes features of a fourth, an eighth and a sixteenth of the
picture's sides. The last are the tokens of a ViT (arXiv 2010.11929). Its states after two of the
layers and the first two features are joined, from coarse to fine, by convolutions.

Fields carry the names of transformers' `DPTConfig` and, `embedding_size` to `num_groups`, of the
`BitConfig` in it. What the published network has fixed has no field.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import gelu
from cnxs_jax.models.clip import EncoderLayer
from cnxs_jax.models.conv import Conv, GroupNorm, plain
from cnxs_jax.models.layers import Dense

MULTIPLE = 32  # of the picture's sides in pixels: the coarsest features are a 32nd
PATCH = 16
BOTTLENECK = 4  # how much narrower a block of the ResNet is inside


class DPTHybrid(nn.Module):
    """`apply({"params": p}, x [B,H,W,3]) -> [B,H,W]` float32, 0 or more: inverse depth.

    Larger is nearer; scale and offset are the picture's own. `x` is RGB in [-1, 1].

    Args:
        embedding_size: channels of the ResNet's stem; `hidden_sizes`, `depths`: channels and blocks
            of its three stages; `num_groups`: of its norms.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, layer_norm_eps: of
            the ViT.
        image_size: pixels a side of the square that its position embeddings were made for.
        backbone_out_indices: the two layers whose states are joined (the last two of the config's
            four: the others mean the ResNet's features).
        neck_hidden_sizes: channels of what is joined, from fine to coarse; of the features they are
            those that they have.
        fusion_hidden_size: channels of the joint.

    Raises ConfigError for pictures whose sides are no multiples of 32.
    """

    embedding_size: int = 64
    hidden_sizes: tuple = (256, 512, 1024)
    depths: tuple = (3, 4, 9)
    num_groups: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-6
    image_size: int = 384
    backbone_out_indices: tuple = (8, 11)
    neck_hidden_sizes: tuple = (256, 512, 768, 768)
    fusion_hidden_size: int = 256

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        if C != 3 or H % MULTIPLE or W % MULTIPLE or not H * W:
            what = f"expected [B,H,W,3] with sides that are multiples of {MULTIPLE}, got"
            raise ConfigError(f"{what} {list(x.shape)}", "DPT's picture")
        features = BiT(
            self.embedding_size, self.hidden_sizes, self.depths, self.num_groups, name="backbone"
        )(x.astype(jnp.float32))
        tokens = Conv(self.hidden_size, 1, name="projection")(features[-1])
        vit, maps = ViT(self.clone(parent=None, name=None), name="encoder"), features[:2]
        for i, state in enumerate(vit(tokens), 2):
            strides = 2 if i == len(self.neck_hidden_sizes) - 1 else 1
            reassemble = Reassemble(self.neck_hidden_sizes[i], strides, name=f"reassemble_{i}")
            maps.append(reassemble(state, H // PATCH, W // PATCH))
        h, size = None, self.fusion_hidden_size
        for i, finer in reversed(list(enumerate(maps))):
            finer = nn.Conv(size, (3, 3), padding=1, use_bias=False, name=f"convs_{i}")(finer)
            h = Fusion(size, name=f"fusion_{len(maps) - 1 - i}")(h, finer)
        return Head(name="head")(h)


class BiT(nn.Module):
    """Features of the three stages, [B,H/4,W/4,..] to [B,H/16,W/16,..], in a list."""

    embedding_size: int
    hidden_sizes: tuple
    depths: tuple
    num_groups: int

    @nn.compact
    def __call__(self, x):
        h = nn.relu(ConvNorm(self.embedding_size, self.num_groups, 7, 2, name="stem")(x))
        h, features = nn.max_pool(h, (3, 3), (2, 2), "SAME"), []
        for i, (width, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            h = Stage(width, depth, self.num_groups, 2 if i else 1, name=f"stages_{i}")(h)
            features.append(h)
        return features


class Stage(nn.Module):
    """Blocks of the ResNet, the first with a stride."""

    features: int
    depth: int
    num_groups: int
    strides: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            strides = 1 if i else self.strides
            x = Bottleneck(self.features, self.num_groups, strides, not i, name=f"layers_{i}")(x)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, a norm after each, beside a shortcut.

    `projected`: the shortcut has a convolution and a norm.
    """

    features: int
    num_groups: int
    strides: int
    projected: bool

    @nn.compact
    def __call__(self, x):
        def conv_norm(i, h, features, *sizes):
            h = StandardizedConv(features, *sizes, name=f"conv{i}")(h)
            return GroupNorm(self.num_groups, 1e-5, name=f"norm{i}")(h)

        inside = self.features // BOTTLENECK
        h = nn.relu(conv_norm(1, x, inside))
        h = nn.relu(conv_norm(2, h, inside, 3, self.strides))
        h = conv_norm(3, h, self.features)
        if self.projected:
            x = ConvNorm(self.features, self.num_groups, 1, self.strides, name="downsample")(x)
        return nn.relu(h + x)


class ConvNorm(nn.Module):
    """A standardised convolution and a norm."""

    features: int
    num_groups: int
    kernel_size: int
    strides: int

    @nn.compact
    def __call__(self, x):
        x = StandardizedConv(self.features, self.kernel_size, self.strides, name="conv")(x)
        return GroupNorm(self.num_groups, 1e-5, name="norm")(x)


class StandardizedConv(nn.Module):
    """Convolution without bias whose kernel is normalised for each output (arXiv 1903.10520).

    Padded as TensorFlow pads: of an odd number of pixels one more below and to the right.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean((0, 1, 2))[None, None, None]
        variance = jnp.square(kernel).mean((0, 1, 2))[None, None, None]
        return plain(x, kernel * jax.lax.rsqrt(variance + 1e-8), self.strides, "SAME")


class ViT(nn.Module):
    """Features [B,h,w,D] -> the states [B,1+h*w,D] after the layers `backbone_out_indices`."""

    config: nn.Module

    @nn.compact
    def __call__(self, features):
        c, (B, h, w, D) = self.config, features.shape
        side, init = c.image_size // PATCH, nn.initializers.normal(0.02)
        first = self.param("cls_token", init, (1, 1, D))
        positions = self.param("position_embeddings", init, (1, 1 + side**2, D))
        own, grid = positions[:, :1], positions[:, 1:].reshape(1, side, side, D)
        grid = jax.image.resize(grid, (1, h, w, D), "bilinear", antialias=False)
        x = (features + grid).reshape(B, h * w, D)
        x = jnp.concatenate([jnp.broadcast_to(first + own, (B, 1, D)), x], axis=1)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
        )
        sizes = c.num_attention_heads, c.intermediate_size, "gelu", c.layer_norm_eps, jnp.float32
        _, states = layers(*sizes, name="layers")(x, None)
        return [states[i] for i in c.backbone_out_indices]


class Layer(EncoderLayer):
    """CLIP's layer, which puts out its result as well."""

    def __call__(self, x, _):
        (_, x), _ = super().__call__((x, x), None, None)
        return x, x


class Reassemble(nn.Module):
    """A state [B,1+h*w,D] as a map: its tokens, each told what the class token knows; section 3.

    `strides`: of a further convolution; none if it is 1.
    """

    features: int
    strides: int

    @nn.compact
    def __call__(self, state_BxLxD, height, width):
        B, _, D = state_BxLxD.shape
        known, tokens = state_BxLxD[:, :1], state_BxLxD[:, 1:]
        both = jnp.concatenate([tokens, jnp.broadcast_to(known, tokens.shape)], axis=-1)
        h = gelu(Dense(D, name="readout")(both)).reshape(B, height, width, D)
        h = Conv(self.features, 1, name="projection")(h)
        if self.strides == 1:
            return h
        return Conv(self.features, strides=self.strides, name="resize")(h)


class Fusion(nn.Module):
    """What came from the coarser maps and a finer map -> both, with twice the sides; figure 1."""

    features: int

    @nn.compact
    def __call__(self, coarser, finer):
        h = finer
        if coarser is not None:
            h = coarser + ResidualConv(self.features, name="residual_layer1")(finer)
        h = ResidualConv(self.features, name="residual_layer2")(h)
        # Published the other way round, which is the same at four times the cost.
        return doubled(Conv(self.features, 1, name="projection")(h))


class ResidualConv(nn.Module):
    """ReLU and 3x3 convolution, twice, beside the identity."""

    features: int

    @nn.compact
    def __call__(self, x):
        h = Conv(self.features, name="convolution1")(nn.relu(x))
        return x + Conv(self.features, name="convolution2")(nn.relu(h))


class Head(nn.Module):
    """[B,h,w,C] -> [B,2h,2w], 0 or more."""

    @nn.compact
    def __call__(self, h):
        h = doubled(Conv(h.shape[-1] // 2, name="conv_0")(h))
        h = nn.relu(Conv(32, name="conv_2")(h))
        return nn.relu(Conv(1, 1, name="conv_4")(h))[..., 0]


def doubled(x):
    """Twice the sides, bilinear, the corners of [B,h,w,C] in their places (`align_corners`)."""
    for axis in (1, 2):
        size = x.shape[axis]
        place = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
        low = np.floor(place).astype(np.int32)
        share = np.expand_dims((place - low).astype(np.float32), [a for a in range(4) if a != axis])
        high = np.minimum(low + 1, size - 1)
        x = (1 - share) * jnp.take(x, low, axis, mode="clip") + share * jnp.take(
            x, high, axis, mode="clip"
        )
    return x
