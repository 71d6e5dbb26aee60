"""A UNet with controllers that work between its stages, and what those controllers share.

The loop is the one of `models.unet`. A controller runs its own stream beside the base's and says
at every stage what it adds to the base. Its methods, called with its own feature map `c` and the
base's `h`, both [B,H,W,C]:

    ready = prepare(hint, cond)             # once: the hint's features, the text's keys and values
    learned_time(features) -> [B,E] | None  # an embedding that is mixed into the base's
    embed(t, temb, ready) -> temb           # the one that its own layers take
    down(i, c, h, temb, ready, cond) -> c
    from_down(i, c) -> (to the stream, to the skip alone), each or None
    mid(c, h, temb, ready, cond) -> c;  from_mid(c)
    before_up(k, skips);  up(k, c, h, skips, temb, ready, cond) -> c;  after_up(k, c)

Conditions: `hint` [B,f*H,f*W,3] in [0, 1], f = `module.hint_factor`; `control_scale` [B] multiplies
what is added to the base; `connection_scale` [B, 2N+1] the same for each connection (N encoder
stages, the middle, N decoder stages); with several adapters all three are tuples. `control_active`
[B], written by the sampling loop, is 0 where the controller must not act at all. That may differ
from a scale of 0 if the adapter has a learned time embedding, which the base receives, too:
`controlnet_xs` says where.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import factors
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import silu
from cnxs_jax.models.conv import Conv
from cnxs_jax.models.unet import UNet

WHERE = 'cond["hint"]'
MIX_EXPONENT = 0.3  # of the learned time embedding's share, in both published implementations
COMPAT = ("official", "diffusers", "diffusers_pretrained")


def zero_conv(features, kernel_size=1, dtype=jnp.float32, name=None):
    """A convolution that starts as zero, so that a fresh controller adds nothing."""
    zeros = nn.initializers.zeros
    return Conv(features, kernel_size, dtype=dtype, kernel_init=zeros, name=name)


class HintEmbedding(nn.Module):
    """[B,f*H,f*W,C] -> [B,H,W,features], f = 2 ** (len(widths) - 1).

    diffusers' `ControlNetConditioningEmbedding` with its parameter names.
    """

    features: int
    widths: tuple = (16, 32, 96, 256)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hint):
        def conv_silu(name, features, h, strides=1):
            return silu(Conv(features, strides=strides, dtype=self.dtype, name=name)(h))

        h = conv_silu("conv_in", self.widths[0], hint)
        for i, (narrow, wide) in enumerate(itertools.pairwise(self.widths)):
            h = conv_silu(f"blocks_{2 * i}", narrow, h)
            h = conv_silu(f"blocks_{2 * i + 1}", wide, h, strides=2)
        return zero_conv(self.features, 3, self.dtype, name="conv_out")(h)


class Adapters(nn.Module):
    """Several controllers of one base; their parameters lie under `adapters_0`, `adapters_1` ..."""

    adapters: tuple[nn.Module, ...]

    def each(self):
        """The controllers, bound."""
        return self.adapters


class ControlledUNet(nn.Module):
    """A UNet with control: a denoiser with parameters {"base": ..., "control": ...}.

    Reads `hint`, `control_scale`, `connection_scale` and `control_active` (see the file's head)
    beside what the base reads, for any height and width that the base takes.

    Args:
        compat: "official", or one of the ways of diffusers; see `ControlNetXS`.
    """

    base: UNet
    control: nn.Module
    compat: str = "official"

    hint_kind = "image"

    # What pipelines ask a denoiser for.
    in_channels = property(lambda self: self.base.in_channels)
    sample_size = property(lambda self: self.base.sample_size)
    addition_embed_type = property(lambda self: self.base.addition_embed_type)
    time_cond_proj_dim = property(lambda self: self.base.time_cond_proj_dim)
    cross_attention_dim = property(lambda self: self.base.cross_attention_dim)

    @property
    def several(self):
        """Whether hints and scales are tuples."""
        return isinstance(self.control, Adapters)

    @property
    def hint_factor(self):
        """Pixels of the hint along a side of a latent pixel."""
        return (self.control.adapters[0] if self.several else self.control).hint_factor

    @property
    def num_connections(self):
        """Length of `connection_scale`: encoder stages, the middle, decoder stages."""
        return 2 * self.base.num_stages + 1

    def __call__(self, x, t, cond):
        cond = self.prepare(cond)
        self._check_size(x, cond)
        base, adapters, ready = self.base, self._adapters(), cond["prepared_control"]
        weights = Weights(cond, self.several, len(adapters), x.shape[0], self.num_connections)
        temb = self._time(t, cond, adapters, weights)
        runs = [
            Run(a, x, a.embed(t, temb, r), r, cond) for a, r in zip(adapters, ready, strict=True)
        ]
        h, skips, n = x, [], base.num_stages
        for i in range(n):
            before, h = h, base.down(i, h, temb, cond)
            added = [run.down(i, before) for run in runs]
            h = weights.add(h, i, [stream for stream, _ in added])
            skips.append(weights.add(h, i, [skip for _, skip in added]))
        added = [run.mid(h) for run in runs]
        h = weights.add(base.mid(h, temb, cond), n, added)
        for k in range(n):
            before = h
            h = weights.add(h, n + 1 + k, [run.before_up(k) for run in runs])
            h = base.up(k, h, skips, temb, cond)
            h = weights.add(h, n + 1 + k, [run.up(k, before) for run in runs])
        return base.head(h)

    def prepare(self, cond):
        """Adds what the steps share: of the base, and the features of hint and text."""
        if "prepared_control" in cond:
            return cond
        adapters = self._adapters()
        hints = hints_of(cond, adapters, self.several)
        cond = self.base.prepare(cond)
        ready = tuple(a.prepare(hint, cond) for a, hint in zip(adapters, hints, strict=True))
        return {**cond, "prepared_control": ready}

    def _adapters(self):
        return self.control.each() if self.several else (self.control,)

    def _time(self, t, cond, adapters, weights):
        """The time embedding of the base, mixed with the learned ones of the controllers."""
        temb = self.base.embed_time(t, cond)
        features = self.base.time_features(t)
        learned = [(i, a, a.learned_time(features)) for i, a in enumerate(adapters)]
        learned = [(i, a, own) for i, a, own in learned if own is not None]
        if learned:
            tied = self.compat == "official"
            shares = time_shares(
                [weights.mix(i, a.time_embedding_mix, tied) for i, a, _ in learned]
            )
            temb = temb * (1.0 - sum(shares)).astype(temb.dtype)
            for share, (_, _, own) in zip(shares, learned, strict=True):
                temb = temb + own * share.astype(own.dtype)
        return self.base.add_condition(temb, cond)

    def _check_size(self, x, cond):
        f = self.hint_factor
        height, width = f * x.shape[1], f * x.shape[2]
        for hint in jax.tree.leaves(cond.get("hint", ())):
            factors.check_batch(hint, x.shape[0])
            if hint.shape[1:3] != (height, width):
                raise ConfigError(
                    f"a hint of {hint.shape[1]}x{hint.shape[2]} pixels for latents of "
                    f"{x.shape[1]}x{x.shape[2]}",
                    WHERE,
                    f"resize the control image to {height}x{width}",
                )


class Run:
    """One controller during one evaluation: its stream and skips, so that the loop stays short."""

    def __init__(self, adapter, x, temb, ready, cond):
        self.adapter, self.stream, self.skips = adapter, x, []
        self.shared = temb, ready, cond

    def down(self, i, h):
        """After the controller's stage `i`: what goes to the base's stream, and to its skip."""
        self.stream = self.adapter.down(i, self.stream, h, *self.shared)
        self.skips.append(self.stream)
        return self.adapter.from_down(i, self.stream)

    def mid(self, h):
        """What the middle adds."""
        self.stream = self.adapter.mid(self.stream, h, *self.shared)
        return self.adapter.from_mid(self.stream)

    def before_up(self, k):
        """What is added before the base's decoder stage `k`."""
        return self.adapter.before_up(k, self.skips)

    def up(self, k, h):
        """What is added after it; `h` is the base's stream before the stage."""
        self.stream = self.adapter.up(k, self.stream, h, self.skips, *self.shared)
        return self.adapter.after_up(k, self.stream)


class Weights:
    """The factors of all adapters and connections, read from `cond`; None stands for 1."""

    def __init__(self, cond, several, count, batch, num_connections):
        def read(key, *rest):
            return factors.read(cond, key, count, several, (batch, *rest))

        self.scales, self.active = read("control_scale"), read("control_active")
        self.connections = read("connection_scale", num_connections)

    def add(self, h, connection, residuals):
        """`h` plus each residual that is not None, times its factors."""
        for i, residual in enumerate(residuals):
            if residual is None:
                continue
            own = [self.scales[i], self.active[i]]
            if self.connections[i] is not None:
                own.append(self.connections[i][:, connection])
            for factor in own:
                if factor is not None:
                    residual = residual * factor.astype(residual.dtype)[:, None, None, None]
            h = h + residual
        return h

    def mix(self, i, mix, tied):
        """[B or 1, 1] float32: how much of adapter `i`'s time embedding, 0 where it is inactive.

        `tied`: the scale counts as part of it.
        """
        mix = jnp.full((1, 1), mix, jnp.float32)
        for factor in (self.scales[i] if tied else None, self.active[i]):
            if factor is not None:
                mix = mix * jnp.maximum(factor.astype(jnp.float32), 0.0)[:, None]
        return mix


def time_shares(mixes):
    """The part of each learned time embedding, of their mixes; the base's own keeps the rest.

    One alone gets `mix ** 0.3`. Several share what their sum would get, in proportion, as what they
    add to the base sums up, too: one of mix 0 is absent, two halves are the whole. More than the
    whole is given away only where one of them takes it alone, at a scale above 1.
    """
    if len(mixes) == 1:
        return [mixes[0] ** MIX_EXPONENT]
    total, largest = sum(mixes), functools.reduce(jnp.maximum, mixes)
    given = jnp.minimum(total, jnp.maximum(largest, 1.0)) ** MIX_EXPONENT
    return [given * mix / jnp.maximum(total, 1e-30) for mix in mixes]


def hints_of(cond, adapters, several):
    """`cond["hint"]` as a tuple, one an adapter, checked.

    Raises ConfigError for missing hints and wrong numbers, shapes, dtypes and, where the values are
    at hand (not under `jit`), for values outside [0, 1].
    """
    hint = cond.get("hint")
    is_tuple = isinstance(hint, tuple | list)
    given = len(hint) if is_tuple else int(hint is not None)
    if is_tuple != several or given != len(adapters):
        raise ConfigError(
            f"{given} hints for {len(adapters)} adapters",
            WHERE,
            "give the control image [B,H,W,3], a tuple of them for several adapters",
        )
    hints = tuple(hint) if several else (hint,)
    for one, adapter in zip(hints, adapters, strict=True):
        check_hint(one, adapter.conditioning_channels)
    return hints


def check_hint(hint, channels=3, where=WHERE):
    """Raises ConfigError unless `hint` is a float [B,H,W,channels] in [0, 1]."""
    if hint.ndim != 4 or hint.shape[-1] != channels:
        raise ConfigError(
            f"a hint of shape {list(hint.shape)}, expected [B,H,W,{channels}]",
            where,
            "repeat a map with one channel three times" if channels == 3 else None,
        )
    if not jnp.issubdtype(hint.dtype, jnp.floating):
        fix = "divide a picture of 0 to 255 by 255.0"
        raise ConfigError(f"a hint of {hint.dtype}, expected floats in [0, 1]", where, fix)
    if isinstance(hint, jax.core.Tracer):
        return
    low, high = float(np.min(hint)), float(np.max(hint))
    if not 0.0 <= low <= high <= 1.0:
        raise ConfigError(
            f"the hint's values reach from {low:g} to {high:g}, expected [0, 1]",
            where,
            "controllers of Stable Diffusion take pictures in [0, 1], not in [-1, 1] or 0 to 255",
        )


def wrap(base, adapters, compat, check):
    """`ControlledUNet` of a UNet and one adapter or a tuple of them.

    Args:
        check: raises ConfigError for an adapter that does not fit the base, by (base, adapter).
    """
    if not isinstance(base, UNet):
        kind = type(base).__name__
        raise ConfigError(f"this controller is for a UNet, not for a {kind}", "control.attach")
    several = isinstance(adapters, tuple)
    same = {"dtype": base.dtype, "remat": base.remat, "attention_impl": base.attention_impl}
    fitted = []
    for adapter in adapters if several else (adapters,):
        check(base, adapter)
        fitted.append(adapter.clone(**same))
    factors = sorted({adapter.hint_factor for adapter in fitted})
    if len(factors) > 1:
        raise ConfigError(f"adapters with hint factors {factors}", "control.attach")
    return ControlledUNet(base, Adapters(tuple(fitted)) if several else fitted[0], compat)


def check_same(base, adapter, pairs, where="control.attach"):
    """Raises ConfigError listing the (name, of the adapter, of the base) that differ."""
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    wrong = [f"{name} {ours}, of the base {theirs}" for name, ours, theirs in differ]
    if differ:
        raise ConfigError(
            f"the {type(adapter).__name__} belongs to another base: {'; '.join(wrong)}",
            where,
            "SD 1.x, 2.x and XL each need their own controllers",
        )
