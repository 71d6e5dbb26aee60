"""Sizes of ControlNet-XS: of every block, of heads and groups, and whether they fit a base."""

import math
import numbers

from cnxs_jax.control.controlled_unet import check_same
from cnxs_jax.control.xs_blocks import most_groups
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import DOWN, latent_sides

TYPES, INFUSIONS = ("A", "B", "C"), ("cat", "add")


class Plan:
    """The sizes of an adapter's blocks. Lists run over levels, highest resolution first."""

    def __init__(self, adapter):
        self.adapter = adapter
        self.own, self.base = adapter.block_out_channels, adapter.base_block_out_channels
        self.layers = adapter.per_level(adapter.layers_per_block)
        self.encoder = [(self.own[0], self.base[0])]  # channels after each stage: own, base
        self.encoder += [(self.own[i], self.base[i]) for i, _ in adapter.down_stages]

    def down(self, level):
        """Fields of an encoder level."""
        first = 1 + next(n for n, (i, _) in enumerate(self.adapter.down_stages) if i == level)
        resample = "down" if level + 1 < len(self.own) else None
        count = self.layers[level] + (resample is not None)
        before = self.encoder[first - 1 : first - 1 + count]
        answers = self.adapter.control_type != "A"
        return {
            **self._level(level, [self._joined(*w) for w in before[: self.layers[level]]]),
            "resample": resample,
            "entries": tuple(self._entry(*w) for w in before),
            "exits": (self.base[level],) * count if answers else (),
        }

    def mid(self):
        """Fields of the middle's level."""
        own, joined = self.own[-1], self._joined(self.own[-1], self.base[-1])
        fields = self._level(len(self.own) - 1, [joined, own], attended=True)
        fields |= {"resample": None, "num_attentions": 1}
        if self.adapter.compat != "official":
            loaded = self.adapter.compat == "diffusers_pretrained"
            most = self.adapter.max_norm_num_groups if loaded else 32
            one = most_groups(math.gcd(own, own + self.base[-1]), most)
            fields |= {"resnet_groups": ((one, one),) * 2, "num_groups": one, "epsilon": 1e-6}
        return fields

    def mid_connections(self):
        """Channels of the zero convolutions into the middle and out of it."""
        return self._entry(self.own[-1], self.base[-1]), self.base[-1]

    def up(self, position):
        """Fields of a level of type C's decoder, counted from the lowest resolution."""
        level = len(self.own) - 1 - position
        count = self.layers[level] + 1
        first = sum(n + 1 for n in self.layers[::-1][:position])
        count -= level == 0  # after the base's last stage nothing is left to control
        before = [self._after_up(k) for k in range(first - 1, first - 1 + count)]
        skips = [self.encoder[-1 - k][0] for k in range(first, first + count)]
        joined = [self._joined(*w) + s for w, s in zip(before, skips, strict=True)]
        return {
            **self._level(level, joined),
            "resample": "up" if level else None,
            "entries": tuple(self._entry(*w) for w in before),
            "exits": (self.base[level],) * count,
        }

    def up_connections(self):
        """Types A and B, per decoder level: the base's channels before each of its stages."""
        stages = self.adapter.up_stages
        widths = [self._after_up(k - 1)[1] for k in range(len(stages))]
        levels = range(len(self.own))
        return [
            tuple(w for w, (i, _) in zip(widths, stages, strict=True) if i == n) for n in levels
        ]

    def _after_up(self, k):
        """(own, base) channels after decoder stage `k`; -1 is the middle."""
        level = -1 if k < 0 else len(self.own) - 1 - self.adapter.up_stages[k][0]
        return self.own[level], self.base[level]

    def _joined(self, own, base):
        return own + base if self.adapter.infusion == "cat" else own

    def _entry(self, own, base):
        return base if self.adapter.infusion == "cat" else own

    def _level(self, level, inputs, attended=False):
        """What all levels have; `inputs` are the resnets' input channels."""
        a, own = self.adapter, self.own[level]
        attended = attended or DOWN[a.down_block_types[level]]
        heads = a.per_level(a.num_attention_heads)[level]
        head_dim = a.per_level(a.attention_head_width)[level] or own // heads
        most = a.max_norm_num_groups
        if a.compat == "diffusers":
            most = most_groups(inputs[0], most)
        return {
            "features": own,
            "num_resnets": len(inputs),
            "depth": a.per_level(a.transformer_layers_per_block)[level] if attended else 0,
            "num_heads": heads,
            "head_dim": head_dim,
            "num_groups": most_groups(own, most),
            "resnet_groups": tuple((most_groups(n, most), most_groups(own, most)) for n in inputs),
            "epsilon": 1e-5,
            "attention_eps": a.attention_eps,
            "use_linear_projection": a.use_linear_projection,
            "concatenates": a.infusion == "cat",
            "dtype": a.dtype,
            "impl": a.attention_impl,
            "remat": a.remat,
        }


def of_base(base):
    """The fields that an adapter shares with its base."""
    return {
        "base_block_out_channels": tuple(base.block_out_channels),
        "cross_attention_dim": base.cross_attention_dim,
        "down_block_types": tuple(base.down_block_types),
        "sample_size": base.sample_size,
        "transformer_layers_per_block": base.transformer_layers_per_block,
        "layers_per_block": base.layers_per_block,
        "use_linear_projection": base.use_linear_projection,
        "upcast_attention": base.upcast_attention,
        "max_norm_num_groups": base.norm_num_groups,
        "in_channels": base.in_channels,
    }


def heads_of(base, widths, head_channels=None):
    """`num_attention_heads` and, where it is needed, `attention_head_width`."""
    heads = base.per_level(base.attention_head_dim)
    if len(set(heads)) == 1 and head_channels is None:
        n = heads[0]
        sizes = tuple(max(n, width // n) for width in widths)
        plain = all(n * size == width for size, width in zip(sizes, widths, strict=True))
        return {"num_attention_heads": n, "attention_head_width": None if plain else sizes}
    most = head_channels or base.block_out_channels[0] // heads[0]
    return {"num_attention_heads": tuple(w // most_groups(w, min(w, most)) for w in widths)}


def check_sizes(base, size_ratio, widths, head_channels):
    """Raises ConfigError for arguments of `from_unet` of which no adapter can be made."""
    where, n = "controlnet_xs.from_unet", len(base.block_out_channels)
    if (size_ratio is None) == (widths is None):
        raise ConfigError("give either size_ratio or block_out_channels", where)
    if widths is None:
        real = isinstance(size_ratio, numbers.Real) and not isinstance(size_ratio, bool)
        if not real or not 0 < size_ratio < math.inf:
            fix = "the published ones lie between 0.0125 and 0.2"
            what = f"size_ratio = {size_ratio!r}, expected a positive number"
            raise ConfigError(what, where, fix)
    elif len(widths) != n or not all(_counts(w) for w in widths):
        what = f"block_out_channels = {tuple(widths)}, expected {n} positive numbers"
        raise ConfigError(what, where, "give the channels of each level")
    if head_channels is not None and not _counts(head_channels):
        raise ConfigError(f"head_channels = {head_channels!r}, expected a positive number", where)


def _counts(value):
    return type(value) is int and value > 0


def check_fit(base, adapter):
    """Raises ConfigError for an adapter of another base, or one that diffusers cannot express."""
    theirs = of_base(base)

    def value(name, given):
        one_each = name in ("transformer_layers_per_block", "layers_per_block")
        return base.per_level(given) if one_each else given

    names = (
        *("base_block_out_channels", "cross_attention_dim", "down_block_types"),
        *("transformer_layers_per_block", "layers_per_block", "in_channels"),
    )
    check_same(
        base, adapter, [(n, value(n, getattr(adapter, n)), value(n, theirs[n])) for n in names]
    )
    if adapter.compat != "official" and (adapter.control_type, adapter.infusion) != ("B", "cat"):
        raise ConfigError(
            f"compat {adapter.compat!r}: diffusers knows only type B with concatenation, not type "
            f"{adapter.control_type} with {adapter.infusion!r}",
            "control.attach",
        )


def check_config(adapter):
    """Raises ConfigError for fields that fit nothing or not each other."""
    where, n = "controlnet-xs config", len(adapter.block_out_channels)
    for name, known in (
        ("control_type", TYPES),
        ("infusion", INFUSIONS),
        ("conditioning_channel_order", ("rgb", "bgr")),
    ):
        given = getattr(adapter, name)
        if given not in known:
            raise ConfigError(f"{name} = {given!r}, expected one of {known}", where)
    for name in ("base_block_out_channels", "down_block_types"):
        if len(getattr(adapter, name)) != n:
            raise ConfigError(f"{name} = {getattr(adapter, name)}, expected {n} of them", where)
    if not set(adapter.down_block_types) <= set(DOWN):
        raise ConfigError(f"down_block_types = {adapter.down_block_types}", where)
    names = ("num_attention_heads", "transformer_layers_per_block", "layers_per_block")
    for name in ("block_out_channels", *names, "attention_head_width"):
        given = adapter.per_level(getattr(adapter, name))
        if name == "attention_head_width" and set(given) == {None}:
            continue
        if len(given) != n or not all(_counts(v) for v in given):
            raise ConfigError(f"{name} = {given}, expected {n} positive numbers", where)
    latent_sides(adapter.sample_size, where)
    heads = adapter.per_level(adapter.num_attention_heads)
    for width, count in zip(adapter.block_out_channels, heads, strict=True):
        if adapter.attention_head_width is None and width < count:
            raise ConfigError(f"{count} attention heads on {width} channels", where)
    if not 0.0 <= adapter.time_embedding_mix <= 1.0:
        given = adapter.time_embedding_mix
        raise ConfigError(f"time_embedding_mix = {given}, expected 0 to 1", where)
    if adapter.time_embedding_mix < 1.0 and not adapter.learn_time_embedding:
        raise ConfigError("time_embedding_mix below 1 needs learn_time_embedding", where)
