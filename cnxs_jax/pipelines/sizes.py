"""Which picture sizes a model can draw: PixArt's aspect-ratio bins and plain divisibility."""

from cnxs_jax.errors import ConfigError

# Height and width in 1/16 of the base size, from wide to tall (PixArt-alpha's test buckets,
# arXiv 2310.00426 section 2.4 on multi-aspect training). The same set serves 256, 512 and 1024.
_BINS = (
    *((8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22)),
    *((11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16)),
    *((16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12)),
    *((22, 11), (23, 11), (24, 10), (25, 10), (27, 9), (32, 8)),
)
# Latent side of the published models -> pixels of the square bin.
_BASES = {128: 1024, 64: 512, 32: 256}
MAX_SIDE = 8192


def bins(sample_size, factor):
    """{ratio: (height, width)} in pixels for a published latent side, None for any other.

    Ratios are height / width rounded to two decimals, because the nearest bin is found by the
    rounded ratio. Only the published 8x VAE has bins: smaller models draw what they are asked to.
    """
    base = _BASES.get(sample_size)
    if base is None or factor != 8:
        return None
    unit = base // 16
    return {round(h / w, 2): (h * unit, w * unit) for h, w in _BINS}


def nearest_bin(height, width, table):
    """The (height, width) of `table` whose ratio is nearest to the wanted one."""
    wanted = height / width
    return table[min(table, key=lambda ratio: abs(ratio - wanted))]


def check_side(name, value, multiple=1):
    """Raises ConfigError unless `value` is a positive int and a multiple of `multiple`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIDE:
        raise ConfigError(f"expected 1 to {MAX_SIDE} pixels, got {value!r}", name)
    if value % multiple:
        lower = max(value // multiple, 1) * multiple
        raise ConfigError(
            f"{value} pixels is not a multiple of {multiple}",
            name,
            f"the two nearest sizes are {lower} and {lower + multiple}",
        )


def resize_and_crop(images, height, width):
    """Covers height x width with [B,H,W,3] (bilinear, no antialias) and cuts out the centre.

    What PixArt's pipelines do with a picture of the nearest bin to give the size asked for.
    """
    import jax

    batch, old_height, old_width, channels = images.shape
    if (old_height, old_width) == (height, width):
        return images
    scale = max(height / old_height, width / old_width)
    new_height, new_width = int(old_height * scale), int(old_width * scale)
    shape = (batch, max(new_height, height), max(new_width, width), channels)
    images = jax.image.resize(images, shape, "linear", antialias=False)
    top, left = (shape[1] - height) // 2, (shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]
