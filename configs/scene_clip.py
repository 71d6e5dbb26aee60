r"""A tiny CLIP on emoji scenes: the CLIP conditions of `configs/ediffi.py` in the embedded world.

The contrastive loss of arXiv 2103.00020 (figure 3; learned temperature, at most 100); both encoders
start from nothing. What differs from the paper, and why: 64 px scenes and captions of at most 24
tokens of the embedded tokenizer; batch 64 instead of 32,768, so pairs with equal captions are left
out of each other's mismatches; kernels start as Xavier's.

  :tiny   1.3 M parameters (the default)
  :smoke  three steps of smaller encoders, to test the plumbing

Run:
  python -m train --config=configs/scene_clip.py --workdir=runs/scene_clip
The result, `runs/scene_clip/export`, is what `clip_path` of `configs/ediffi.py` names. Shipped as
`cnxs_jax/assets/scene_clip`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("tiny", "smoke")


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    config = tiny()
    return smoke(config) if variant == "smoke" else config


def tiny():
    config = common.run("train.tasks_clip:contrastive")
    config.name = "scene_clip"
    config.steps = 1200
    config.batch_size = 64
    config.ema_decay = 0.998
    config.ema_warmup = True
    config.matmul_precision = "auto"
    config.log_every = 50
    config.save_every = 500
    config.sample_every = 10_000  # it draws nothing
    config.data = common.data()
    config.data.size = 64
    config.data.tokenizer = "{assets}/pixart_tiny/tokenizer"
    config.data.max_length = 24
    config.optimizer = common.adamw(
        learning_rate=1e-3, schedule="cosine", warmup_steps=200, final_scale=0.02, b2=0.98,
        weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    config.text_encoder = encoder(128, 3)
    config.text_encoder.vocab_size = 192
    config.text_encoder.max_position_embeddings = 24
    config.text_encoder.eos_token_id = 1
    config.image_encoder = encoder(128, 4)
    config.image_encoder.image_size = 64
    config.image_encoder.patch_size = 8
    return config


def encoder(width, layers):
    config = ConfigDict()
    config.hidden_size = width
    config.intermediate_size = 4 * width
    config.projection_dim = 128
    config.num_hidden_layers = layers
    config.num_attention_heads = max(width // 32, 1)
    return config


def smoke(config):
    """A few steps, to test the plumbing."""
    config.steps, config.batch_size = 3, 8
    config.log_every, config.save_every = 1, 3
    config.optimizer.warmup_steps = 1
    config.data.size = 32
    for part in (config.text_encoder, config.image_encoder):
        part.update({"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16})
        part.update({"num_hidden_layers": 1, "num_attention_heads": 2})
    config.image_encoder.image_size, config.image_encoder.patch_size = 32, 16
    return config
