"""ControlNet (arXiv 2302.05543): a copy of the base's encoder whose skips are added to the base's.

    c_0 = conv_in'(x) + embed(hint);  c_i = stage'_i(c_{i-1});  skip_i = h_i + Z(c_i) * scale

The copy keeps its own time embedding and sees nothing of the base. In contrast to ControlNet-XS the
base's encoder stays as it is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.control import controlled_unet
from cnxs_jax.control.controlled_unet import HintEmbedding, zero_conv
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import UNet

# Fields that the base and its copy share, with the same names.
SHARED = (
    *("in_channels", "down_block_types", "mid_block_type", "block_out_channels"),
    *("layers_per_block", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "use_linear_projection"),
    *("upcast_attention", "addition_embed_type", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "dtype", "remat", "attention_impl"),
)
COPIED = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")


class ControlNet(nn.Module):
    """The adapter. `cnxs_jax.control.attach` puts it on a UNet, `from_unet` makes one for it.

    Fields and parameters carry the names of diffusers' `ControlNetModel`; the fields that a UNet
    has, too, mean the same there.
    """

    in_channels: int = 4
    conditioning_channels: int = 3
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int | tuple = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple = 1
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple = (16, 32, 96, 256)
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None
    attention_impl: str | None = None

    hint_kind = "image"

    @property
    def hint_factor(self):
        """Pixels of the hint along a side of a latent pixel."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def setup(self):
        if self.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            order = self.controlnet_conditioning_channel_order
            raise ConfigError(f"channel order {order!r}, only rgb and bgr", "controlnet config")
        ups = tuple(name.replace("Down", "Up") for name in self.down_block_types[::-1])
        self.encoder = UNet(up_block_types=ups, **{name: getattr(self, name) for name in SHARED})
        nn.share_scope(self, self.encoder)  # parameters without a prefix, as diffusers has them
        widths = self.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = HintEmbedding(
            self.block_out_channels[0], widths, self.dtype
        )
        self.controlnet_down_blocks = [
            zero_conv(width, dtype=self.dtype) for width in self.encoder.down_widths
        ]
        self.controlnet_mid_block = zero_conv(self.block_out_channels[-1], dtype=self.dtype)

    # What `ControlledUNet` calls

    def prepare(self, hint, cond):
        """The features of the hint, and what the copy's layers need of the conditions."""
        if self.controlnet_conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        return {
            "hint": self.controlnet_cond_embedding(hint),
            "prepared": self.encoder.prepare_encoder(cond),
        }

    def learned_time(self, features):
        """Its time embedding stays its own."""
        return None

    def embed(self, t, temb, ready):
        """The copy's own embedding of time, and of SDXL's conditions."""
        features = self.encoder.time_features(t)
        return self.encoder.add_condition(self.encoder.time_embedding(features), ready)

    def down(self, i, c, h, temb, ready, cond):
        """Stage `i` of the copy."""
        c = self.encoder.down(i, c, temb, {**cond, "prepared": ready["prepared"]})
        return c + ready["hint"] if i == 0 else c

    def from_down(self, i, c):
        """Nothing for the stream, the skip's addition."""
        return None, self.controlnet_down_blocks[i](c)

    def mid(self, c, h, temb, ready, cond):
        """The copy's middle."""
        return self.encoder.mid(c, temb, {**cond, "prepared": ready["prepared"]})

    def from_mid(self, c):
        """What the middle adds."""
        return self.controlnet_mid_block(c)

    def before_up(self, k, skips):
        """The decoder reads the corrected skips; nothing else is added."""
        return None

    def up(self, k, c, h, skips, temb, ready, cond):
        """There is no control decoder."""
        return c

    def after_up(self, k, c):
        """There is no control decoder."""
        return None

    def __call__(self, x, t, hint, cond):
        """The additions to the skips and to the middle: what diffusers' `ControlNetModel` returns.

        Args: x [B,H,W,in_channels], t [B], hint [B,f*H,f*W,3], cond as for the UNet.
        """
        ready, c, skips = self.prepare(hint, cond), x, []
        temb = self.embed(t, None, ready)
        for i in range(self.encoder.num_stages):
            c = self.down(i, c, None, temb, ready, cond)
            skips.append(self.from_down(i, c)[1])
        return skips, self.from_mid(self.mid(c, None, temb, ready, cond))

    @staticmethod
    def wrap(base, adapters, compat="official"):
        """The controlled network of a UNet and one adapter or a tuple of them."""
        if compat != "official":
            raise ConfigError(
                f"compat {compat!r}: ControlNet knows only 'official'", "control.attach"
            )
        return controlled_unet.wrap(base, adapters, compat, check_fit)


def from_unet(base, **fields):
    """A `ControlNet` that fits `base`."""
    return ControlNet(**({name: getattr(base, name) for name in SHARED} | fields))


def copied_params(adapter, base_params, key):
    """Fresh parameters: the base's encoder copied, connections zero, the hint embedding random."""
    widths = adapter.conditioning_embedding_out_channels
    embedding = HintEmbedding(adapter.block_out_channels[0], widths)
    hint = jnp.zeros((1, adapter.hint_factor, adapter.hint_factor, adapter.conditioning_channels))
    params = {"controlnet_cond_embedding": jax.jit(embedding.init)(key, hint)["params"]}
    for name, part in base_params.items():
        if name.startswith(COPIED):
            params[name] = jax.tree.map(jnp.array, part)
    embed = params["time_embedding"]  # LCM's guidance embedding is the base's alone
    params["time_embedding"] = {k: v for k, v in embed.items() if k != "cond_proj"}
    encoder = UNet(**{name: getattr(adapter, name) for name in SHARED})

    def zeros(width):
        return {"kernel": jnp.zeros((1, 1, width, width)), "bias": jnp.zeros(width)}

    for i, width in enumerate(encoder.down_widths):
        params[f"controlnet_down_blocks_{i}"] = zeros(width)
    return params | {"controlnet_mid_block": zeros(adapter.block_out_channels[-1])}


def check_fit(base, adapter):
    """Raises ConfigError for an adapter of another base."""
    names = [n for n in SHARED if n not in ("dtype", "remat", "attention_impl", "upcast_attention")]

    def value(module, name):
        given = getattr(module, name)
        per_level = name in ("layers_per_block", "transformer_layers_per_block")
        if per_level or name == "attention_head_dim":
            return base.per_level(given)
        return tuple(given) if isinstance(given, list) else given

    pairs = [(name, value(adapter, name), value(base, name)) for name in names]
    controlled_unet.check_same(base, adapter, pairs)
