"""Telling what stands where from a denoiser's tokens: how it binds words to places.

The denoising loss hardly asks for it. Where a caption decides which of two things is on the left,
exchanging the nouns cost 0.0014 of 0.69 (v-prediction at t = 700), while the tokens in the middle
of a network can be asked outright. So a linear head reads each picture token after two thirds of
the blocks (of a UNet's decoder) and tells which concepts cover its patch; it is trained beside the
denoiser and is not exported. In the manner of REPA (arXiv 2410.06940), with the scenes' exact maps
instead of a pretrained encoder's features.
"""

import jax
import jax.numpy as jnp
import optax

from cnxs_jax.data.pipeline import WORLDS
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.layers import layer_norm
from train import parts

NAME = "layout"  # of the head's kernel [features, 1 + concepts] among the parameters


def check(values, where):
    """Raises ConfigError where `layout` has no maps to learn from, or no text encoder to teach."""
    source, where = values["data"]["source"], f"{where}.layout"
    if values.get("layout") and source not in WORLDS:
        what = f"{source!r} does not say what stands where"
        raise ConfigError(what, where, f"leave it out, or use one of {', '.join(WORLDS)}")
    if values.get("layout") and values.get("text_encoder") is None:
        what = "the layout is learned along with the text encoder"
        raise ConfigError(what, where, "leave it out")


def with_head(init, features, concepts):
    """`init` with the head on tokens of so many features beside it (`parts.with_head`)."""
    return parts.with_head(init, NAME, (features, 1 + concepts), features**-0.5)


def coverage(map_BxHxW, grid, concepts):
    """Shares of each patch that the background and the concepts cover, [B, N, 1 + concepts].

    `map_BxHxW` is a scene's `concept_map`, `grid` the patches (rows, columns).
    """
    B, H, W = map_BxHxW.shape
    rows, columns = grid
    cells = map_BxHxW.reshape(B, rows, H // rows, columns, W // columns)
    cells = cells.transpose(0, 1, 3, 2, 4).reshape(B, rows * columns, -1)
    return jax.nn.one_hot(cells, 1 + concepts).mean(axis=2)


def loss(head, tokens_BxNxD, shares_BxNxK):
    """Mean cross-entropy over the patches, in nats above its least; float32 `[B]`."""
    logits = layer_norm(tokens_BxNxD.astype(jnp.float32)) @ head
    wrong = optax.softmax_cross_entropy(logits, shares_BxNxK)
    least = -jax.scipy.special.xlogy(shares_BxNxK, shares_BxNxK).sum(-1)
    return (wrong - least).mean(axis=1)


def tapped(dit):
    """The denoiser of a PixArt that gives `(output, tokens [B,N,D] after 2/3 of the blocks)`."""

    def denoise(params, x, t, cond):
        out, kept = dit.apply({"params": params}, x, t, cond, mutable=["intermediates"])
        (tokens,) = kept["intermediates"]["transformer_blocks"]["tokens"]  # stacked over the blocks
        return out, tokens[2 * dit.num_layers // 3 - 1]

    return denoise


def tapped_unet(unet):
    """The same of a UNet: the tokens are its features after 2/3 of the decoder's stages."""

    def stages(unet, x, t, cond):
        cond = unet.prepare(cond)
        temb, h, skips = unet.embed(t, cond), x, []
        for i in range(unet.num_stages):
            h = unet.down(i, h, temb, cond)
            skips.append(h)
        h = unet.mid(h, temb, cond)
        for k in range(unet.num_stages):
            h = unet.up(k, h, skips, temb, cond)
            if k == 2 * unet.num_stages // 3 - 1:
                tokens = h.reshape(h.shape[0], -1, h.shape[-1])
        return unet.head(h), tokens

    return lambda params, *args: unet.apply({"params": params}, *args, method=stages)
