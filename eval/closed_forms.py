"""FLOPs of the networks by hand, 2 a multiply-add, of one picture or one text.

The check of `eval.flops`, and a count where a program cannot be walked. Counted are matrix products
and convolutions. The functions read a module's fields (or its class's defaults), never its code.
"""

from cnxs_jax.errors import ConfigError

UP_TAPS, PHASE_TAPS = 9, 4  # of a 3x3 convolution after doubling: as written, as our CPU form


def conv(pixels, inputs, outputs, taps=9):
    """A convolution with `pixels` outputs of each channel."""
    return 2 * pixels * taps * inputs * outputs


def attend(queries, keys, width):
    """The two products of attention, all heads together."""
    return 4 * queries * keys * width


def embedder(inputs, width):
    """Two linear layers: of a timestep's sinusoid or of a caption's token."""
    return 2 * (inputs + width) * width


def pixart(module, tokens, side=None):
    """One evaluation of PixArt (PixArt-alpha, section 2.3) on latents of `side` (sample_size)."""
    D, side = module.features, module.sample_size if side is None else side
    N = (side // module.patch_size) ** 2
    block = 2 * N * 14 * D**2 + attend(N, N, D) + attend(N, tokens, D)
    ends = 2 * N * module.patch_size**2 * (module.in_channels + module.out_channels) * D
    sizes = 3 * embedder(256, D // 3) if module.micro_conditioning else 0
    time = embedder(256, D) + 2 * 6 * D**2 + sizes
    return module.num_layers * block + pixart_text(module, tokens) + time + ends


def pixart_text(module, tokens):
    """Its part that reads only the text: the embedding, and every block's keys and values."""
    D = module.features
    embedding = tokens * embedder(module.caption_channels, D)
    return embedding + module.num_layers * 4 * tokens * D**2


def resnet(pixels, inputs, outputs, time=0):
    """Two 3x3 convolutions, a 1x1 one where the width changes, the timestep's projection."""
    shortcut = conv(pixels, inputs, outputs, 1) if inputs != outputs else 0
    twice = conv(pixels, inputs, outputs) + conv(pixels, outputs, outputs)
    return twice + shortcut + 2 * time * outputs


def transformer(pixels, width, depth, tokens, context):
    """`SpatialTransformer`: two projections around `depth` blocks with GEGLU."""
    own = 4 * 2 * pixels * width**2 + attend(pixels, pixels, width)
    keys_values = 2 * 2 * tokens * context * width
    cross = 2 * 2 * pixels * width**2 + keys_values + attend(pixels, tokens, width)
    return depth * (own + cross + 24 * pixels * width**2) + 4 * pixels * width**2


def halved(side, times):
    """The side after halving it, rounded up."""
    return -(-side // 2**times)


def own_side(module):
    """The side of the square latents that a UNet's config names. Raises ConfigError for others."""
    given = module.sample_size
    sides = set(given if isinstance(given, tuple | list) else [given])
    if len(sides) != 1 or sides == {None}:
        what = f"closed forms are for square latents, not for sample_size {given}"
        raise ConfigError(what, "side", "give `side`")
    return sides.pop()


def unet_parts(module, tokens=77, side=None, up_taps=UP_TAPS):
    """{"embed", "encoder", "middle", "decoder"} of `unet`.

    `conv_in` is the encoder's, `conv_out` the decoder's.
    """
    widths, layers = module.block_out_channels, module.per_level(module.layers_per_block)
    side = own_side(module) if side is None else side
    cross, time = module.cross_attention_dim, 4 * widths[0]

    def layer(pixels, inputs, width, depth):
        extra = transformer(pixels, width, depth, tokens, cross) if depth else 0
        return resnet(pixels, inputs, width, time) + extra

    embed = embedder(widths[0], time)
    if module.addition_embed_type:
        embed += embedder(module.projection_class_embeddings_input_dim, time)
    encoder, h, skips = conv(side**2, module.in_channels, widths[0]), widths[0], [widths[0]]
    depths = attended_depths(module, module.down_block_types)
    for i, width in enumerate(widths):
        for _ in range(layers[i]):
            encoder += layer(side**2, h, width, depths[i])
            h = width
            skips.append(h)
        if i + 1 < len(widths):
            side = halved(side, 1)
            encoder += conv(side**2, h, h)
            skips.append(h)
    deepest = module.per_level(module.transformer_layers_per_block)[-1]
    middle = layer(side**2, h, h, deepest) + resnet(side**2, h, h, time)
    decoder, depths = 0, attended_depths(module, module.up_block_types[::-1])
    for i in reversed(range(len(widths))):
        for _ in range(layers[i] + 1):
            decoder += layer(side**2, h + skips.pop(), widths[i], depths[i])
            h = widths[i]
        if i:
            side *= 2
            decoder += conv(side**2, h, h, up_taps)
    decoder += conv(side**2, h, module.out_channels)
    return {"embed": embed, "encoder": encoder, "middle": middle, "decoder": decoder}


def attended_depths(module, kinds):
    """Transformer blocks after a resnet, 0 where the level has none; highest resolution first."""
    depths = module.per_level(module.transformer_layers_per_block)
    return [d if k.startswith("CrossAttn") else 0 for d, k in zip(depths, kinds, strict=True)]


def unet(module, tokens=77, side=None, up_taps=UP_TAPS):
    """One evaluation of Stable Diffusion's or SDXL's UNet on latents of `side` (sample_size)."""
    return sum(unet_parts(module, tokens, side, up_taps).values())


def unet_transformers(module, side):
    """(part, pixels, width, depth) of each transformer of a UNet; parts as in `unet_parts`."""
    layers, last = module.per_level(module.layers_per_block), len(module.block_out_channels) - 1
    for i, width in enumerate(module.block_out_channels):
        pixels = halved(side, i) ** 2
        yield from [
            ("encoder", pixels, width, attended_depths(module, module.down_block_types)[i])
        ] * layers[i]
        if i == last:
            yield "middle", pixels, width, module.per_level(module.transformer_layers_per_block)[i]
        yield from [
            ("decoder", pixels, width, attended_depths(module, module.up_block_types[::-1])[i])
        ] * (layers[i] + 1)


def unet_text(module, tokens, parts=("encoder", "middle", "decoder")):
    """The part that reads only the text: keys and values of the transformers in `parts`."""
    return sum(
        depth * 2 * 2 * tokens * module.cross_attention_dim * width
        for part, _, width, depth in unet_transformers(module, 1)
        if part in parts
    )


def unet_self_attention(module, side, parts=("encoder", "middle", "decoder")):
    """The two products among the picture's own tokens, of the transformers in `parts`."""
    return sum(
        depth * attend(pixels, pixels, width)
        for part, pixels, width, depth in unet_transformers(module, side)
        if part in parts
    )


def vae_decoder(module, side, up_taps=UP_TAPS):
    """Latents of `side` to a picture."""
    widths, latents = module.block_out_channels[::-1], module.latent_channels
    h, pixels = widths[0], side**2
    total = conv(pixels, latents, latents, 1) + conv(pixels, latents, h)
    total += 2 * resnet(pixels, h, h) + 8 * pixels * h**2 + attend(pixels, pixels, h)
    for i, width in enumerate(widths):
        for _ in range(module.layers_per_block + 1):
            total += resnet(pixels, h, width)
            h = width
        if i + 1 < len(widths):
            pixels *= 4
            total += conv(pixels, h, h, up_taps)
    return total + conv(pixels, h, module.out_channels)


def t5(module, tokens):
    """The T5 encoder of one text."""
    D, inner = module.d_model, module.num_heads * module.d_kv
    matrices = 3 if module.feed_forward_proj.startswith("gated") else 2
    feed = 2 * tokens * D * module.d_ff * matrices
    return module.num_layers * (8 * tokens * D * inner + attend(tokens, tokens, inner) + feed)


def clip_layers(module, tokens):
    """All layers of either tower."""
    D = module.hidden_size
    feed = 4 * tokens * D * module.intermediate_size
    return module.num_hidden_layers * (8 * tokens * D**2 + attend(tokens, tokens, D) + feed)


def clip_text(module, tokens=77, projected=False):
    """CLIP's text encoder, with its projection where the class has one."""
    projection = 2 * module.hidden_size * module.projection_dim if projected else 0
    return clip_layers(module, tokens) + projection


def clip_image(module):
    """CLIP's image encoder with its projection."""
    D, patches = module.hidden_size, (module.image_size // module.patch_size) ** 2
    embedding = conv(patches, module.num_channels, D, module.patch_size**2)
    return embedding + clip_layers(module, patches + 1) + 2 * D * module.projection_dim


def train_step(forward):
    """A forward pass and both gradients, without rematerialisation."""
    return 3 * forward


def lcd_step(forward):
    """Student forward and backward, the teacher twice (guidance), the averaged student once."""
    return 6 * forward
