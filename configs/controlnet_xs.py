r"""ControlNet-XS (arXiv 2312.06573) on a frozen Stable Diffusion; or ControlNet, as its baseline.

A small network that exchanges features with its base in every evaluation. Only its parameters have
gradients, moments and an average; the base is an argument of the step.

  :tiny   on the embedded base (`configs/sd.py`), 64 px (the default): edge F1 0.81, 0.27 without
          control, in 12 minutes of two cores with tile units (docs/results/controlnet_xs.md)
  :smoke  four steps of it at 32 px, to test the plumbing
  :sd15   Stable Diffusion 1.5, 512 px: 52,661,392 parameters to train (the authors' "53M")
  :sd21   Stable Diffusion 2.1 base, 512 px: 14,186,356 ("14M", with its own time embedding)
  :sdxl   Stable Diffusion XL base, 512 px: 20,177,984 ("20M")

Released training code (the paper's repository): AdamW with weight decay 1e-2, constant learning
rate 1e-5 for 1.5 and 2.1 and 1e-4 for XL, no average; 1.5 and 2.1: 500,000 steps; XL: at most 1,000
epochs, gradients clipped at 0.01; plain noise prediction, uniform timesteps, 512 px. The hint is
Canny, whose two thresholds are drawn for each picture in every epoch. Its batch size
is a placeholder of 1 a GPU; an author's own file of the 14M model has 5 on one GPU.

Where this recipe differs, and why:
  - batch 32 (XL: 16); steps for XL as for the others. Neither figure is published.
  - an average of the parameters is kept (`ema_decay`), and exported.
  - half of the captions become the empty prompt, as ControlNet trains (arXiv 2302.05543, section
    3.3), so that guidance works; the released data set has no captions at all. :tiny drops 10 %.
  - the base gets no gradients; the released code computes them and throws them away.
  - :tiny has batches of 16 and a rate of 1e-3: the published rates belong to other sizes.

`data.hint`: canny, hed, midas (any pictures), lines, depth, segmentation (scenes only). The
published depth models follow midas, whose weights are `data.hint_path`.
`control`: the size (`size_ratio` of the base's channels, or `block_out_channels`), `control_type`
"A", "B" or "C", `infusion` "cat" or "add", `learn_time_embedding`, `time_embedding_mix`, `compat`.
`control.kind = "controlnet"` trains the original ControlNet with everything else the same; it reads
none of these but the hint embedding's widths.

Run:
  python -m train --config=configs/controlnet_xs.py --workdir=runs/xs        # :tiny
  python -m train --config=configs/controlnet_xs.py --workdir=runs/cn \
      --config.control.kind=controlnet                                       # the baseline
  python -m train --config=configs/controlnet_xs.py:sd21 --workdir=runs/sd21 \
      --config.base_path=stable-diffusion-2-1-base --config.data.root=photos
  python -m train.plan --config=configs/controlnet_xs.py:sdxl --what=train --devices=8 \
      --config.base_path=stable-diffusion-xl-base-1.0
The base is a diffusers directory; that of :tiny is `cnxs_jax/assets/sd_tiny`, which `configs/sd.py`
made. The result, the adapter in diffusers' layout, is `runs/xs/export/controlnet`, for
  cnxs_jax.load_pipeline("cnxs_jax/assets/sd_tiny", control="runs/xs/export/controlnet")
"""

from ml_collections import ConfigDict, config_dict

from configs import common

BASES = {
    "sd15": "stable-diffusion-v1-5",
    "sd21": "stable-diffusion-2-1-base",
    "sdxl": "stable-diffusion-xl-base-1.0",
}
VARIANTS = ("tiny", "smoke", *BASES)


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    if variant in BASES:
        return full(variant)
    config = tiny()
    return smoke(config) if variant == "smoke" else config


def published():
    """What the released code says for Stable Diffusion 1.5; the variants change what they must."""
    config = common.run("train.tasks_unet:controller")
    config.name = "controlnet_xs"
    config.steps = 500_000
    config.batch_size = 32
    config.ema_decay = 0.9999
    config.ema_warmup = True
    config.caption_dropout = 0.5
    config.guidance_scale = 7.5  # of the pictures that a run draws
    config.control = ConfigDict()
    config.control.kind = "controlnet_xs"
    config.control.size_ratio = config_dict.placeholder(float)
    config.control.block_out_channels = config_dict.placeholder(tuple)
    config.control.head_channels = config_dict.placeholder(int)
    config.control.control_type = "B"
    config.control.infusion = "cat"
    config.control.learn_time_embedding = False
    config.control.time_embedding_mix = 1.0
    config.control.compat = "official"
    config.optimizer = common.adamw(
        learning_rate=1e-5, schedule="constant", warmup_steps=0, weight_decay=0.01,
        clip_norm=config_dict.placeholder(float),
    )  # fmt: skip
    config.schedule = common.betas("scaled_linear", 0.00085, 0.012)
    config.objective = ConfigDict()
    config.objective.prediction = "epsilon"
    config.data = common.any_data("image_folder")
    config.data.hint = "canny"
    # Weights of midas, or of hed if not the installed ones.
    config.data.hint_path = config_dict.placeholder(str)
    config.log_every = 50
    config.save_every = 1000
    config.sample_every = 1000
    return config


def full(variant):
    """One of the published sizes."""
    config = published()
    common.large(config, 512, max_length=77)
    config.base_path = BASES[variant]
    if variant == "sd15":
        config.control.size_ratio = 0.2
    if variant == "sd21":
        config.control.size_ratio = 0.0125
        config.control.head_channels = 8
        config.control.learn_time_embedding = True
    if variant == "sdxl":
        config.control.size_ratio = 0.05
        config.batch_size = 16
        config.optimizer.learning_rate = 1e-4
        config.optimizer.clip_norm = 0.01
    return config


def tiny():
    config = published()
    config.base_path = "{assets}/sd_tiny"
    config.dtype = "float32"
    config.matmul_precision = "auto"
    config.steps = 1800
    config.batch_size = 16
    config.ema_decay = 0.99
    config.caption_dropout = 0.1
    config.guidance_scale = 3.0
    config.sample_every = 600
    config.save_every = 300
    # a fifth of what ControlNet would train; a latent's 16 pixels of lines need some width
    config.control.block_out_channels = (24, 24, 32)
    config.control.conditioning_embedding_out_channels = (16, 32, 64)  # 4 pixels a latent
    config.optimizer.update(
        learning_rate=1e-3, schedule="cosine", warmup_steps=50, final_scale=0.02, clip_norm=1.0
    )
    config.schedule = common.betas("linear", 1e-4, 0.02)
    config.objective.prediction = "v_prediction"
    config.data.source = "emoji_scenes"
    config.data.size = 64
    config.data.max_length = 24
    config.report = common.controller_report()
    return config


def smoke(config):
    """A few steps on the base of `configs/sd.py:smoke`, or on any other, to test the plumbing."""
    config.report = None
    common.short(config, steps=4, save_every=2)
    config.data.size = 32
    config.control.block_out_channels = None
    config.control.size_ratio = 0.25
    config.control.conditioning_embedding_out_channels = (4, 8, 8)
    return config
