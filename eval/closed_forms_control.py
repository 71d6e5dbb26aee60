"""FLOPs of controlled UNets and of their train steps by hand; see `closed_forms`.

`base` is the UNet, `adapter` the controller's module; only fields are read.
"""

import itertools

from eval.closed_forms import (
    UP_TAPS,
    conv,
    halved,
    own_side,
    resnet,
    transformer,
    unet,
    unet_parts,
    unet_self_attention,
    unet_text,
)


def hint_embedding(adapter, side, features):
    """The control picture to features of the latents' `side`: two convolutions a halving."""
    widths = adapter.conditioning_embedding_out_channels
    pixels = (side * 2 ** (len(widths) - 1)) ** 2
    total = conv(pixels, adapter.conditioning_channels, widths[0])
    for narrow, wide in itertools.pairwise(widths):
        total += conv(pixels, narrow, narrow) + conv(pixels // 4, narrow, wide)
        pixels //= 4
    return total + conv(pixels, widths[-1], features)


def controlnet(base, adapter, tokens=77, side=None):
    """What a ControlNet adds: a second encoder and middle, a 1x1 convolution a skip, the hint."""
    side = own_side(base) if side is None else side
    parts = unet_parts(base, tokens, side)
    widths, layers = base.block_out_channels, base.per_level(base.layers_per_block)
    total = parts["embed"] + parts["encoder"] + parts["middle"]
    total += hint_embedding(adapter, side, widths[0]) + conv(side**2, widths[0], widths[0], 1)
    for i, width in enumerate(widths):
        total += layers[i] * conv(halved(side, i) ** 2, width, width, 1)
        lowest = i + 1 == len(widths)  # there the middle's convolution, else the downsampler's
        total += conv(halved(side, i if lowest else i + 1) ** 2, width, width, 1)
    return total


def controlnet_xs(base, adapter, tokens=77, side=None):
    """What a ControlNet-XS of type B with concatenation adds (arXiv 2312.06573, section 3)."""
    side = own_side(base) if side is None else side
    layers, time = base.per_level(base.layers_per_block), 4 * base.block_out_channels[0]
    depths = adapter.per_level(adapter.transformer_layers_per_block)
    pairs = list(zip(adapter.block_out_channels, base.block_out_channels, strict=True))

    def layer(pixels, inputs, own, depth):
        extra = transformer(pixels, own, depth, tokens, base.cross_attention_dim) if depth else 0
        return resnet(pixels, inputs, own, time) + extra

    own, h = pairs[0]
    total = hint_embedding(adapter, side, own) + conv(side**2, adapter.in_channels, own)
    total += conv(side**2, own, h, 1)
    skips = [own]
    for i, (width, base_width) in enumerate(pairs):
        depth = depths[i] if base.down_block_types[i].startswith("CrossAttn") else 0
        for _ in range(layers[i]):
            total += conv(side**2, h, h, 1) + layer(side**2, own + h, width, depth)
            own, h = width, base_width
            total += conv(side**2, own, h, 1)
            skips.append(own)
        if i + 1 < len(pairs):
            total += conv(side**2, h, h, 1)
            side = halved(side, 1)
            total += conv(side**2, own + h, own) + conv(side**2, own, h, 1)
            skips.append(own)
    total += conv(side**2, h, h, 1) + layer(side**2, own + h, own, depths[-1])
    total += resnet(side**2, own, own, time) + conv(side**2, own, h, 1)
    for i, (_, width) in reversed(list(enumerate(pairs))):
        for _ in range(layers[i] + 1):  # a connection before each stage of the decoder
            total += conv(side**2, skips.pop(), h, 1)
            h = width
        side *= 2
    return total


ADDED = {"ControlNetXS": controlnet_xs, "ControlNet": controlnet}


def added(base, adapter, tokens=77, side=None):
    """What the adapter adds to one evaluation of the base."""
    return ADDED[type(adapter).__name__](base, adapter, tokens, side)


def controlled(base, adapter, tokens=77, side=None, up_taps=UP_TAPS):
    """One evaluation with control, hint and text included."""
    return unet(base, tokens, side, up_taps) + added(base, adapter, tokens, side)


def prepared(base, adapter, tokens=77, side=None):
    """The part of it that neither x nor t changes: the hint's features, the text's keys, values."""
    side = own_side(base) if side is None else side
    hint = hint_embedding(adapter, side, adapter.block_out_channels[0])
    return hint + unet_text(base, tokens) + adapter_text(base, adapter, tokens)


def adapter_text(base, adapter, tokens):
    """Keys and values of the adapter's own transformers."""
    like = base.clone(block_out_channels=tuple(adapter.block_out_channels))
    return unet_text(like, tokens, ("encoder", "middle"))


def train_step(base, adapter, tokens=77, side=None, up_taps=UP_TAPS):
    """A step of the adapter alone, the base frozen, without rematerialisation.

    Adapter: forward and both gradients. Base: forward, and once back where its activations depend
    on the control (of a ControlNet the decoder, of a ControlNet-XS all): a product with weights has
    one gradient there instead of two, the products of self-attention have both.
    """
    side = own_side(base) if side is None else side
    forward, touched = unet_parts(base, tokens, side, up_taps), ("encoder", "middle", "decoder")
    if type(adapter).__name__ == "ControlNet":
        touched = ("decoder",)
    back = sum(forward[part] for part in touched) + unet_self_attention(base, side, touched)
    return sum(forward.values()) + back + 3 * added(base, adapter, tokens, side)
