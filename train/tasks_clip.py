"""The task `contrastive`: a CLIP of text and picture encoder (arXiv 2103.00020) on captioned data.

Trained from nothing on the embedded scenes it gives eDiff-I its CLIP conditions there.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.data.text import load_tokenizer
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from cnxs_jax.models.conditioning import clip_pixels
from train import inputs
from train.loop import Task
from train.parts import check_tokenizer, fields, make

MAX_SCALE = 100.0  # of the logits (section 2.5)
KEYS = {
    "contrastive": {
        "data": inputs.KEYS,
        "text_encoder": fields(CLIPTextModelWithProjection),
        "image_encoder": fields(CLIPVisionModelWithProjection),
    }
}


def check_contrastive(values, where):
    if values["grad_accum"] != 1:
        what = "the loss compares all pairs of a batch, parts of it would be another loss"
        raise ConfigError(what, f"{where}.grad_accum", "set it to 1")
    widths = [values[k].get("projection_dim", 768) for k in ("text_encoder", "image_encoder")]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"texts have {widths[0]} channels, pictures {widths[1]}",
            f"{where}.text_encoder.projection_dim",
        )


CONFLICTS = {"contrastive": check_contrastive}


def contrastive(config):
    """Trains both encoders; exports them and the tokenizer as `configs/ediffi.py` reads them."""
    text = make(CLIPTextModelWithProjection, config.text_encoder)
    image = make(CLIPVisionModelWithProjection, config.image_encoder)
    loader, tokenizer = inputs.open_loader(config)
    check_tokenizer(tokenizer, text)

    def encode(encoders, raw, key):
        pixels = clip_pixels(raw["image"].astype(jnp.float32) / 255.0, image.image_size)
        return {"x": pixels, "cond": {"ids": raw["input_ids"]}}

    def init(key):
        keys = jax.random.split(key)
        side = image.image_size
        return {
            "text": text.init(keys[0], jnp.zeros((1, 2), jnp.int32))["params"],
            "image": image.init(keys[1], jnp.zeros((1, side, side, 3)))["params"],
            "logit_scale": jnp.log(jnp.float32(1 / 0.07)),
        }

    def objective(params, ema, frozen, batch, keys):
        texts = text.apply({"params": params["text"]}, batch["cond"]["ids"])["pooled"]
        images = image.apply({"params": params["image"]}, batch["x"])
        same = jnp.all(batch["cond"]["ids"][:, None] == batch["cond"]["ids"][None], axis=-1)
        return pairs_loss(texts, images, params["logit_scale"], same)

    def export(ema, frozen, encoders, path):
        from cnxs_jax.pipelines.load import save_model

        save_model(text, ema["text"], path / "clip_text_encoder")
        save_model(image, ema["image"], path / "clip_image_encoder")
        load_tokenizer(config.data.tokenizer).save_pretrained(path / "clip_tokenizer")

    return Task(objective, init, loader, encode, export=export)


def pairs_loss(texts_BxP, images_BxP, logit_scale, same_BxB=None):
    """Symmetric cross-entropy over the pairs of a batch (figure 3), and how often the match wins.

    Args:
        same_BxB: pairs of equal captions; but for the pair itself they count as no mismatch.
    """
    texts, images = (
        v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (texts_BxP, images_BxP)
    )
    logits = jnp.minimum(jnp.exp(logit_scale), MAX_SCALE) * texts @ images.T
    right = jnp.eye(len(logits), dtype=bool)
    if same_BxB is not None:
        logits = jnp.where(same_BxB & ~right, -jnp.inf, logits)
    by_text, by_image = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    loss = -(jnp.diag(by_text) + jnp.diag(by_image)).mean() / 2
    found = jnp.argmax(logits, axis=1) == jnp.arange(len(logits))
    seen = jnp.argmax(logits, axis=0) == jnp.arange(len(logits))
    metrics = {"text_to_image": found.mean(), "image_to_text": seen.mean()}
    return loss, {k: v.astype(np.float32) for k, v in metrics.items()}
