"""ControlNet-Transformer of PixArt-delta (arXiv 2401.05252, section 4).

The control image, encoded to latents, goes through the base's own patch embedder. Copies of the
first N blocks carry it beside the base; zero linears add what they find to the base's stream:

    c = block'_0(source + before(hint)); c = block'_i(c);  residual_i = scale * after_i(c)

The orders differ in the source of the copies and in where the residuals go:

- `released`: the source is the output of the base's first block, residual i is added after block i.
  This is what the published weights were trained with.
- `paper`: the source is the input of the first block, as figure 4 (c) draws it.
- `unet`: figure 4 (b), the first half of the blocks seen as an encoder and the second as a decoder:
  residual i is added to the input of block L-1-i, as a skip connection would be.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import factors
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.dit import (
    PixArt,
    PixArtBlock,
    remat_options,
    scanned_blocks,
    text_keys_values,
    unrolled,
)
from cnxs_jax.models.layers import Dense
from cnxs_jax.models.painting import paint_at

ORDERS = ("released", "paper", "unet")


class ControlBlock(nn.Module):
    """A copied block and the zero linear that reads it: `(c, residual)`, both [B,N,D]."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None

    @nn.compact
    def __call__(self, c_BxNxD, text_kv, t0_Bx6xD, context_BxSxD, mask_BxS, paint=None):
        block = PixArtBlock(
            self.num_heads, self.head_dim, self.dtype, self.impl, name="transformer_block"
        )
        c, _ = block(c_BxNxD, text_kv, t0_Bx6xD, context_BxSxD, mask_BxS, paint)
        return c, zero_linear(c.shape[-1], self.dtype, name="after_proj")(c)


def zero_linear(features, dtype, name=None):
    """A linear layer that starts as zero, so that a fresh controller changes nothing."""
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.zeros, name=name)


class ControlNetTransformer(nn.Module):
    """The adapter: `num_layers` copied blocks. `cnxs_jax.control.attach` puts it on a PixArt.

    Its hint are latents [B,H,W,C] of the size of `x`, scaled as `x` is.

    Args:
        num_layers: N, the number of copied blocks.
        num_attention_heads, attention_head_dim: those of the base.
        order: "released", "paper" or "unet"; see the file's head.
    """

    num_layers: int = 13
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    order: str = "released"
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None
    attention_impl: str | None = None

    hint_factor = 1
    hint_kind = "latents"

    @property
    def features(self):
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def setup(self):
        self.before_proj = zero_linear(self.features, self.dtype)
        blocks = scanned_blocks(self.num_layers, self.remat, self.features, ControlBlock)
        self.controlnet_blocks = blocks(
            self.num_attention_heads, self.attention_head_dim, self.dtype, self.attention_impl
        )

    def __call__(self, source_BxNxD, prepared, text, scale_B=None):
        """Residuals [num_layers, B, N, D] for the base's stream, times `scale_B`.

        `text`: what a block reads after the keys and values, see `PixArtBlock`.
        """
        if self.is_initializing():
            self.before_proj(source_BxNxD)  # on its own, the adapter is not prepared before
        c = source_BxNxD + prepared["hint"]
        _, out = self.controlnet_blocks(c, prepared["kv"], *text)
        if scale_B is None:
            return out
        return out * scale_B.astype(out.dtype)[None, :, None, None]

    def prepare(self, hint_BxNxD, context_BxSxD):
        """What does not depend on the step: the hint's tokens, the text's keys and values."""
        hint = self.before_proj(hint_BxNxD)
        if self.is_initializing():
            return {"hint": hint, "kv": None}
        blocks = self.variables["params"]["controlnet_blocks"]["transformer_block"]
        return {"hint": hint, "kv": text_keys_values(blocks, context_BxSxD)}

    @staticmethod
    def wrap(base, adapters, compat="official"):
        """The controlled network of a PixArt and one adapter or a tuple of them."""
        if compat != "official":
            raise ConfigError(
                f"compat {compat!r}: ControlNet-Transformer knows only 'official'",
                "control.attach",
                "its variants are the field `order`",
            )
        if not isinstance(base, PixArt):
            raise ConfigError(
                f"ControlNet-Transformer controls a PixArt, not a {type(base).__name__}",
                "control.attach",
            )
        same = {"dtype": base.dtype, "remat": base.remat, "attention_impl": base.attention_impl}
        several = isinstance(adapters, tuple)
        for adapter in adapters if several else (adapters,):
            check_fit(base, adapter)
        if not several:
            return ControlledPixArt(base, adapters.clone(**same))
        together = Adapters(tuple(adapter.clone(**same) for adapter in adapters))
        together.check()
        return ControlledPixArt(base, together)


class Adapters(nn.Module):
    """Several adapters of one order and depth: hints and scales are tuples, residuals add up."""

    adapters: tuple[ControlNetTransformer, ...]

    @property
    def order(self):
        """The order of all."""
        return self.adapters[0].order

    @property
    def num_layers(self):
        """The depth of all."""
        return self.adapters[0].num_layers

    def check(self):
        """Raises ConfigError unless order and depth are the same."""
        kinds = {(adapter.order, adapter.num_layers) for adapter in self.adapters}
        if len(kinds) > 1:
            raise ConfigError(
                f"adapters of different order or depth: {sorted(kinds)}", "control.attach"
            )

    def __call__(self, source, prepared, text, scale=None):
        scale = (None,) * len(self.adapters) if scale is None else scale
        parts = zip(self.adapters, prepared, scale, strict=True)
        return sum(adapter(source, p, text, s) for adapter, p, s in parts)

    def prepare(self, hints, context):
        pairs = zip(self.adapters, hints, strict=True)
        return tuple(adapter.prepare(hint, context) for adapter, hint in pairs)


class ControlledPixArt(nn.Module):
    """A PixArt with control: a denoiser with parameters {"base": ..., "control": ...}.

    Reads `hint` (latents [B,H,W,C], or a tuple of them for several adapters) and, if it is there,
    `control_scale` [B] beside what the base reads.
    """

    base: PixArt
    control: ControlNetTransformer | Adapters

    hint_factor = ControlNetTransformer.hint_factor
    hint_kind = ControlNetTransformer.hint_kind

    # What pipelines ask a denoiser for.
    in_channels = property(lambda self: self.base.in_channels)
    patch_size = property(lambda self: self.base.patch_size)
    sample_size = property(lambda self: self.base.sample_size)
    micro_conditioning = property(lambda self: self.base.micro_conditioning)

    def __call__(self, x, t, cond):
        cond = self.prepare(cond)
        several = isinstance(self.control, Adapters)
        count = len(self.control.adapters) if several else 1
        scales = factors.read(cond, "control_scale", count, several, x.shape[:1])
        for hint in jax.tree.leaves(cond["hint"]):
            factors.check_batch(hint, x.shape[0])
            if hint.shape[1:3] != x.shape[1:3]:
                raise ConfigError(
                    f"a hint of {hint.shape[1]}x{hint.shape[2]}, latents of {x.shape[1]}x"
                    f"{x.shape[2]}",
                    'cond["hint"]',
                )
        h, emb, t0 = self.base.embed(x, t, cond)
        kv, context = cond["prepared"]["kv"], cond["prepared"]["context"]
        p = self.base.patch_size
        paint = paint_at(cond, (x.shape[1] // p, x.shape[2] // p), context.shape[1])
        text = (t0, context, cond.get("text_mask"), paint)
        run = self._create if self.is_initializing() else self._blocks

        def control(source):
            scale = scales if several else scales[0]
            return self.control(source, cond["prepared_control"], text, scale)

        h = run(h, control, (kv, *text))
        return self.base.final(h, emb, x.shape[1:3])

    def prepare(self, cond):
        """Adds the text's keys and values of all blocks and the features of the hint."""
        if "prepared_control" in cond:
            return cond
        cond = self.base.prepare(cond)
        context = cond["prepared"]["context"]
        hints = jax.tree.map(self._tokens, check_hint(cond, self.control))
        return {**cond, "prepared_control": self.control.prepare(hints, context)}

    def _tokens(self, hint):
        if hint.shape[-1] != self.base.in_channels:
            raise ConfigError(
                f"a hint of {hint.shape[-1]} channels, expected latents of {self.base.in_channels}",
                'cond["hint"]',
                "encode the control image with the VAE and scale it as x is scaled",
            )
        return self.base.tokens(hint)

    def _create(self, h, control, text):
        """The first call makes the parameters: the base's scan and the adapter's."""
        h, _ = self.base.transformer_blocks(h, *text)
        return h + control(h)[-1]

    def _blocks(self, h, control, text):
        """The base's blocks with the adapter's residuals, in its order."""
        L, N = self.base.num_layers, self.control.num_layers
        params = self.base.variables["params"]["transformer_blocks"]

        def run(h, start, stop, residuals=None):
            return run_blocks(self.base, params, h, text, start, stop, residuals)

        if self.control.order == "released":
            h = run(h, 0, 1)
            residuals = control(h)
            h = run(h + residuals[0], 1, N, residuals[1:])
            return run(h, N, L)
        residuals = control(h)
        if self.control.order == "paper":
            return run(run(h, 0, N, residuals), N, L)
        h = run(h, 0, L - 1 - N)  # after block L-2-i is before block L-1-i
        return run(run(h, L - 1 - N, L - 1, residuals[::-1]), L - 1, L)


def run_blocks(base, params, h_BxNxD, text, start, stop, residuals=None):
    """Blocks `start` to `stop` of the base, residual i added to the output of block start + i.

    The layers are picked by index inside the scan: a slice of the stack would copy its weights.
    """
    if start == stop:
        return h_BxNxD
    kv, *others = text
    # parent=None: the block is applied with given parameters, it is no submodule.
    block = PixArtBlock(
        base.num_attention_heads,
        base.attention_head_dim,
        base.dtype,
        base.attention_impl,
        parent=None,
    )

    def body(h, layer):
        i, residual = layer
        own, own_kv = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (params, kv)
        )
        h, _ = block.apply({"params": own}, h, own_kv, *others)
        return (h if residual is None else h + residual), None

    if base.remat is not None:
        body = jax.checkpoint(body, **remat_options(base.remat))
    layers = jnp.arange(start, stop, dtype=jnp.int32), residuals
    unroll = (stop - start) if unrolled(base.num_layers, base.features) > 1 else 1
    return jax.lax.scan(body, h_BxNxD, layers, unroll=unroll)[0]


def from_base(base_params, num_layers=13):
    """Fresh parameters of a `ControlNetTransformer`: copied blocks and zero linears.

    Raises ConfigError if the base has fewer blocks.
    """
    blocks = base_params["transformer_blocks"]
    table = blocks["scale_shift_table"]
    depth, _, features = table.shape
    if not 1 <= num_layers <= depth:
        raise ConfigError(f"{num_layers} copies of {depth} blocks", "num_layers")
    copies = jax.tree.map(lambda a: a[:num_layers].copy(), blocks)  # on the host if the base is

    def zeros(*shape):
        kernel = np.zeros((*shape, features, features), table.dtype)
        return {"kernel": kernel, "bias": np.zeros((*shape, features), table.dtype)}

    return {
        "before_proj": zeros(),
        "controlnet_blocks": {"transformer_block": copies, "after_proj": zeros(num_layers)},
    }


def check_fit(base, adapter):
    """Raises ConfigError where the adapter's order, shape or depth cannot be."""
    if adapter.order not in ORDERS:
        raise ConfigError(
            f"unknown order {adapter.order!r}.{did_you_mean(adapter.order, ORDERS)}",
            "ControlNetTransformer.order",
            f"use one of {', '.join(ORDERS)}",
        )
    for name in ("num_attention_heads", "attention_head_dim"):
        ours, theirs = getattr(adapter, name), getattr(base, name)
        if ours != theirs:
            raise ConfigError(f"{name} {ours} of the adapter, {theirs} of the base", "control")
    most = base.num_layers // 2 if adapter.order == "unet" else base.num_layers
    if adapter.num_layers > most:
        raise ConfigError(
            f"{adapter.num_layers} copied blocks, the base of {base.num_layers} takes {most} "
            f"in the order {adapter.order!r}",
            "ControlNetTransformer.num_layers",
        )


def check_hint(cond, control):
    """`cond["hint"]`, one or a tuple as the adapters are. Raises ConfigError."""
    several = isinstance(control, Adapters)
    count = len(control.adapters) if several else 1
    hint = cond.get("hint")
    given = len(hint) if isinstance(hint, tuple | list) else int(hint is not None)
    if given != count or several != isinstance(hint, tuple | list):
        raise ConfigError(
            f"{given} hints for {count} adapters",
            'cond["hint"]',
            "give latents [B,H,W,C] of the control image, a tuple for several adapters",
        )
    return tuple(hint) if several else hint
