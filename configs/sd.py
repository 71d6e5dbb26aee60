r"""The embedded Stable Diffusion: a tiny UNet and CLIP text encoder trained on emoji scenes.

The layout of Stable Diffusion (arXiv 2112.10752): a UNet with cross-attention to a causal CLIP text
encoder, on latents of the embedded PixArt's VAE (4x down, 8 channels, 16x16 of 64 px pictures).

  :tiny   about 6 M parameters (the default)
  :smoke  six steps of a smaller one at 32 px, to test the plumbing

What differs from the paper, and why:
  - the text encoder is trained with the UNet: CLIP's words are not those of the scenes. All tokens
    are attended to, padding too, as in Stable Diffusion.
  - v-prediction on linear betas from 1e-4 to 0.02 instead of noise on scaled-linear ones: those
    leave 7 % of the signal at the last step, from which so small a picture's colours can be read,
    and sampling starts without them.
  - attention at the lowest two resolutions and not at the highest, as in SDXL (arXiv 2307.01952):
    a third of the time of a step.
  - `layout`: the decoder's features learn what stands where (`train/layout.py`).
  - timesteps are logit-normal (arXiv 2403.03206), each picture is encoded once and noised twice,
    products take bfloat16 factors where that is faster, as in `configs/pixart.py`.

Run:
  python -m train --config=configs/sd.py --workdir=runs/sd            # :tiny
  python -m train --config=configs/sd.py:smoke --workdir=runs/smoke   # tests the plumbing
  python -m train --config=configs/sd.py --workdir=runs/sd --resume   # go on
  python -m train --config=configs/sd.py --workdir=runs/longer --config.init_path=runs/sd/export
The result, a directory that diffusers' StableDiffusionPipeline opens, is `runs/sd/export`: the base
of `configs/controlnet_xs.py`.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

VARIANTS = ("tiny", "smoke")


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    config = tiny()
    return smoke(config) if variant == "smoke" else config


def tiny():
    config = common.run("train.tasks_unet:base")
    config.name = "sd"
    config.steps = 2900
    config.batch_size = 32
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.matmul_precision = "auto"
    config.log_every = 50
    config.save_every = 500
    config.sample_every = 1000
    config.vae_path = "{assets}/pixart_tiny/vae"
    config.init_path = config_dict.placeholder(str)  # of a pipeline to train on
    config.caption_dropout = 0.1
    config.guidance_scale = 3.0  # of the pictures that a run draws
    config.data = common.data()
    config.data.size = 64
    config.data.relations = 0.5  # share of captions that name a relation for certain
    config.data.tokenizer = "{assets}/sd_tiny/tokenizer"
    config.data.max_length = 24
    config.optimizer = common.adamw(
        learning_rate=1e-3, schedule="cosine", warmup_steps=300, final_scale=0.02, b2=0.99,
        weight_decay=0.01, clip_norm=1.0,
    )  # fmt: skip
    config.layout = 0.2
    config.unet = unet((48, 96, 128), (2, 3, 4), 96)
    config.text_encoder = text_encoder(96, 3)
    config.schedule = common.betas("linear", 1e-4, 0.02)
    config.objective = ConfigDict()
    config.objective.prediction = "v_prediction"
    config.objective.logit_normal = (0.0, 1.2)
    config.objective.noises = 2
    config.objective.t_range = (0, 1000)  # all times; an expert has a part of them
    return config


def unet(widths, heads, text_width):
    """SDXL's order of blocks: no attention at the highest resolution."""
    config = ConfigDict()
    levels = len(widths)
    config.sample_size = 16
    config.in_channels = config.out_channels = 8
    config.block_out_channels = widths
    config.layers_per_block = 1
    config.down_block_types = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1)
    config.up_block_types = ("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",)
    config.attention_head_dim = heads  # numbers of heads, in spite of the name
    config.cross_attention_dim = text_width
    config.norm_num_groups = 16
    config.use_linear_projection = True
    return config


def text_encoder(width, layers):
    config = ConfigDict()
    config.vocab_size = 791  # of the tokenizer, whose last token ends a text
    config.eos_token_id = 790
    config.max_position_embeddings = 24
    config.hidden_size = width
    config.intermediate_size = 4 * width
    config.projection_dim = width
    config.num_hidden_layers = layers
    config.num_attention_heads = max(width // 32, 1)
    return config


def smoke(config):
    """A few steps of the smallest networks, to test the plumbing."""
    common.short(config, steps=6, save_every=3)
    config.data.size = 32
    config.unet = unet((16, 32), (1, 2), 16)
    config.unet.sample_size = 8
    config.text_encoder = text_encoder(16, 1)
    return config
