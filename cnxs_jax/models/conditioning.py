"""The three encoders of eDiff-I (arXiv 2211.01324, section 4.1) as one condition.

T5 tokens, CLIP text tokens with their pooled vector, and the CLIP embedding of a picture. Training
and sampling call the same `Encoders`; any of the three may be missing. The pixel UNet projects what
is there and masks what is not (`models.pixel_unet.Context`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError

# What CLIP's pictures are normalised by (arXiv 2103.00020, its released preprocessing).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MASKS = ("text_mask", "clip_text_mask", "clip_image_mask")


@dataclass(frozen=True)
class Encoders:
    """`encoders(params, inputs) -> cond`; equal for equal modules, so fit to be static in a jit.

    Attributes:
        text: a `T5Encoder`, reads `input_ids`, `attention_mask` [B,L].
        clip_text: a CLIP text model, reads `clip_input_ids`, `clip_attention_mask` [B,M].
        clip_image: a CLIP vision model, reads `clip_pixels` [B,S,S,3] (`clip_pixels` makes them)
            and perhaps `clip_image_mask` [B]. Without `clip_pixels` it is left out.
    """

    text: Any = None
    clip_text: Any = None
    clip_image: Any = None

    def __call__(self, params, inputs):
        """The encoders' part of `cond`; `params` has a tree for each encoder that is there."""
        cond = {}
        if self.text is not None:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            cond["text"] = self.text.apply({"params": params["text"]}, ids, mask)
            cond["text_mask"] = mask
        if self.clip_text is not None:
            # Without a mask, as CLIP is trained: causal, so what pads the end reaches no word.
            out = self.clip_text.apply({"params": params["clip_text"]}, inputs["clip_input_ids"])
            cond |= {"clip_text": out["last"], "pooled": out["pooled"]}
            cond["clip_text_mask"] = inputs["clip_attention_mask"]
        if self.clip_image is not None and "clip_pixels" in inputs:
            pixels = inputs["clip_pixels"]
            cond["clip_image"] = self.clip_image.apply({"params": params["clip_image"]}, pixels)
            there = jnp.ones(pixels.shape[:1], jnp.int32)
            cond["clip_image_mask"] = inputs.get("clip_image_mask", there)
        return cond

    def widths(self):
        """`{field of PixelUNet: channels}` of the encoders that are there."""
        found = {}
        if self.text is not None:
            found["text_dim"] = self.text.d_model
        if self.clip_text is not None:
            found["clip_text_dim"] = self.clip_text.hidden_size
            projected = type(self.clip_text).__name__ == "CLIPTextModelWithProjection"
            found["pooled_dim"] = (
                self.clip_text.projection_dim if projected else self.clip_text.hidden_size
            )
        if self.clip_image is not None:
            found["clip_image_dim"] = self.clip_image.projection_dim
        return found

    def check(self, unet, where="unet"):
        """Raises ConfigError where `unet` does not take what these encoders give."""
        for name, width in self.widths().items():
            if getattr(unet, name) != width:
                raise ConfigError(
                    f"{name} {getattr(unet, name)}, but the encoder gives {width}",
                    f"{where}.{name}",
                    f"set it to {width}",
                )


def dropped(cond):
    """The masks of `cond` as zeros: what differs when nothing is conditioned on."""
    return {name: jnp.zeros_like(cond[name]) for name in MASKS if name in cond}


def clip_pixels(images, size):
    """CLIP's input [B,size,size,3] of pictures [B,H,W,3] in [0, 1].

    The shorter side becomes `size` (cubic, antialiased), the centre is cut out, and the channels
    are normalised.
    """
    batch, height, width = images.shape[:3]
    if min(height, width) != size:
        scale = size / min(height, width)
        shape = (batch, round(height * scale), round(width * scale), 3)
        images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0.0, 1.0)
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    images = images[:, top : top + size, left : left + size]
    mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (images - mean) / std
