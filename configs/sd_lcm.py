r"""Latent consistency distillation of Stable Diffusion (LCM, arXiv 2310.04378; 2311.05556).

A student that draws in four steps what its teacher draws in fifty with guidance. Which guidance,
omega, is built in (as in `pixart_lcm.py`), or is an input of the student: drawn for each picture in
training, read through an embedding beside the timestep's, chosen when sampling. Or the student is
an adapter on the teacher, LCM-LoRA, which other fine-tunings of that teacher take, too.

  :tiny        the embedded Stable Diffusion (`configs/sd.py`), 64 px, omega = 2 (the default)
  :tiny_omega  the same with an embedding of omega in [1, 5]
  :tiny_lora   the same as an adapter of rank 4, omega = 2
  :smoke       four steps of :tiny_omega at 32 px, to test the plumbing
  :sd15        Stable Diffusion 1.5, 512 px, an embedding of omega in [5, 15]
  :sd21        Stable Diffusion 2.1 base, 512 px, an embedding of omega in [2, 14]
  :sdxl        Stable Diffusion XL base, 1024 px, an embedding of omega in [3, 15]
  :NAME_fixed  the same for each of these three with omega = 7.5 built in
  :NAME_lora   an adapter of rank 64; omega in the same range, without an embedding

Published figures, P: the paper (section 5.1), S: the scripts of diffusers
(examples/consistency_distillation, their README's command):
  - P, :sd21: AdamW 8e-6, EMA 0.999943, omega in [2, 14], batch 72, 100,000 iterations, k = 20.
  - S, the others: AdamW 1e-6, weight decay 0, clipping at 1, EMA 0.95, pseudo-Huber with c = 0.001,
    batch 12, 1,000 iterations, N = 50; adapters of rank and alpha 64 on all linear layers and the
    resnets' convolutions.

Where this recipe differs, and why:
  - the embedding's projection starts at zero, so that the student starts as its teacher; S draws
    it at random.
  - an adapter's target is its own moving average, as in full distillation; S chases the adapter.
  - :sd21 takes loss, clipping and weight decay from S, where P says nothing.
  - S computes in float16; here bfloat16 with float32 parameters, solver and loss.
  - neither has a student with one omega built in, which PixArt-delta finds better than an
    embedding; 7.5 is what diffusers' pipeline asks of the embedding unless told otherwise.
  - :tiny predicts v (its teacher does) and learns at 3e-4 with clipping at 1.

Run:
  python -m train --config=configs/sd_lcm.py --workdir=runs/sd_lcm           # :tiny
  python -m train --config=configs/sd_lcm.py:sd15 --workdir=runs/lcm15 \
      --config.teacher_path=stable-diffusion-v1-5 --config.data.root=photos
  python -m train.plan --config=configs/sd_lcm.py:sdxl --what=train --devices=4
The teacher is a diffusers directory; the result, one with an LCMScheduler, is `--workdir`/export,
an adapter for diffusers `export/lora/pytorch_lora_weights.safetensors`.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

TEACHERS = {
    "sd15": "stable-diffusion-v1-5",
    "sd21": "stable-diffusion-2-1-base",
    "sdxl": "stable-diffusion-xl-base-1.0",
}
RANGES = {"sd15": (5.0, 15.0), "sd21": (2.0, 14.0), "sdxl": (3.0, 15.0)}
KINDS = ("fixed", "lora")
FULL = (*TEACHERS, *(f"{name}_{kind}" for kind in KINDS for name in TEACHERS))
VARIANTS = ("tiny", "tiny_omega", "tiny_lora", "smoke", *FULL)
ATTENTION = (r".*/(to_q|to_k|to_v|to_out_0)/kernel",)
TARGETS = (
    r".*/(to_q|to_k|to_v|to_out_0|proj_in|proj_out|net_0/proj|net_2)/kernel",
    r".*/(conv1|conv2|conv_shortcut|time_emb_proj|(down|up)samplers_0/conv)/kernel",
)


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    name, _, kind = variant.partition("_")
    if name in TEACHERS:
        return full(name, kind)
    config = tiny()
    if kind == "lora":
        config.lora = adapter(4, ATTENTION)
        config.optimizer.learning_rate = 1e-3
    if kind == "omega" or variant == "smoke":
        embedded(config, (1.0, 5.0), 64)
        config.guidance_scale = 3.0
    return smoke(config) if variant == "smoke" else config


def published():
    """What diffusers' scripts say; the variants change what they must."""
    config = common.run("train.tasks_unet_lcm:distill")
    config.name = "sd_lcm"
    config.steps = 1000
    config.batch_size = 12
    config.ema_decay = 0.95
    config.guidance_embedding = config_dict.placeholder(int)
    config.guidance_scale = config_dict.placeholder(float)  # of the pictures that a run draws
    config.lora = config_dict.placeholder(ConfigDict)
    config.optimizer = common.adamw(
        learning_rate=1e-6, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=1.0
    )
    config.schedule = common.betas("scaled_linear", 0.00085, 0.012)
    config.objective = ConfigDict()
    config.objective.prediction = "epsilon"
    config.objective.omega = config_dict.placeholder(float)
    config.objective.omega_range = config_dict.placeholder(tuple)
    config.objective.num_ddim_steps = 50
    config.objective.loss = "pseudo_huber"
    config.objective.huber_c = 1e-3
    config.data = common.any_data("image_folder")
    config.log_every = 10
    config.save_every = 200
    config.sample_every = 500
    config.freeze = ()  # patterns of parameters that stay the teacher's
    return config


def embedded(config, omega_range, width):
    """Makes omega an input of the student."""
    config.objective.omega = None
    config.objective.omega_range = omega_range
    config.guidance_embedding = width


def adapter(rank, targets):
    return ConfigDict({"rank": rank, "alpha": float(rank), "targets": targets})


def full(name, kind):
    """One of the published sizes; `kind` is one of `KINDS` or empty."""
    config = published()
    common.large(config, 1024 if name == "sdxl" else 512, max_length=77)
    config.teacher_path = TEACHERS[name]
    embedded(config, RANGES[name], 256)
    if name == "sd21":
        config.steps, config.batch_size, config.ema_decay = 100_000, 72, 0.999943
        config.optimizer.learning_rate = 8e-6
    if kind:
        config.guidance_embedding = None
    if kind == "fixed":
        config.objective.omega, config.objective.omega_range = 7.5, None
    if kind == "lora":
        config.lora = adapter(64, TARGETS)
    return config


def tiny():
    config = published()
    config.teacher_path = "{assets}/sd_tiny"
    config.dtype = "float32"
    config.matmul_precision = "auto"
    config.steps = 400
    config.batch_size = 32
    config.save_every = 100
    config.sample_every = 100
    config.optimizer.update(learning_rate=3e-4, schedule="cosine", warmup_steps=20, final_scale=0.1)
    config.schedule = common.betas("linear", 1e-4, 0.02)
    config.objective.prediction = "v_prediction"
    config.objective.omega = 2.0
    config.data = common.data()
    config.data.size = 64
    config.data.relations = 0.5  # as its teacher was trained
    config.data.max_length = 24
    return config


def smoke(config):
    """A few steps, to test the plumbing."""
    common.short(config, steps=4, save_every=2)
    config.data.size = 32
    return config
