r"""A reference picture's style for PixArt: CLIP's picture as pseudo-words of the prompt.

eDiff-I gives its denoiser the CLIP embedding of a picture in training (arXiv 2211.01324, section
4.1). PixArt saw none, so the embedding is turned into words of T5's input, as textual inversion
finds a word for a concept (arXiv 2208.01618) but by a network for any picture: with them T5 is to
give what it gives where the caption names the picture's style. Denoiser and T5 stay as they are,
and no denoiser runs in training. What a caption cannot name, this cannot take over.

  :tiny   the embedded PixArt, scenes and CLIP (the default)
  :smoke  three steps, to test the plumbing

Run:
  python -m train --config=configs/pixart_style.py --workdir=runs/style
  pipe = cnxs_jax.load_pipeline("cnxs_jax/assets/pixart_tiny", style="runs/style/export")
  pipe("a tiger", style_image=picture)

For pictures of your own: `--config.data.source=image_folder --config.data.root=photos`, each line
of whose metadata.jsonl also has a "style"; `text_path` is the pipeline's directory, and `clip_path`
has `CLIPVisionModelWithProjection` as `clip_image_encoder`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("tiny", "smoke")


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    config = tiny()
    if variant == "smoke":
        common.short(config, steps=3, save_every=3)
        config.words.hidden_size = 16
    return config


def tiny():
    config = common.run("train.tasks_style:style_words")
    config.name = "pixart_style"
    config.steps = 1500
    config.batch_size = 64
    config.ema_decay = 0.99
    config.ema_warmup = True
    config.log_every = 50
    config.save_every = 500
    config.sample_every = 10_000  # it draws nothing
    config.data = common.any_data()
    config.data.size = 64
    config.data.max_length = 32
    config.text_path = "{assets}/pixart_tiny"
    config.clip_path = "{assets}/scene_clip"
    config.phrase = ", {} style"
    config.words = ConfigDict({"num_words": 3, "hidden_size": 512})
    config.optimizer = common.adamw(
        learning_rate=1e-3, schedule="cosine", warmup_steps=50, final_scale=0.02, b2=0.99,
        weight_decay=0.05, clip_norm=1.0,
    )  # fmt: skip
    return config
