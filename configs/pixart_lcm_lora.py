r"""LCM-LoRA for PixArt (arXiv 2311.05556; PixArt-delta, section 6): a student that is an adapter.

The distillation of `pixart_lcm.py` with the teacher frozen and low-rank updates of its linear
layers trained alone. Its target network is the adapter's own moving average, as in full
distillation; PixArt's and diffusers' scripts have none and chase the student itself.

  :tiny     the embedded teacher, 64 px (the default)
  :smoke    four steps of it, to test the plumbing
  :xl_256   PixArt-XL/2, 256 px, rank 32
  :xl_512   the same at 512 px
  :xl_1024  the same at 1024 px, with micro-conditioning

Published (PixArt's `train_pixart_lcm_lora.py`; no figures in the paper): rank 32, alpha 8, every
linear layer, 16 pictures a GPU. The learning rate is the one of full distillation. `:tiny` takes
rank 4 and alpha = rank: at its width of 192 higher ranks are no small part of the network.

Run:
  python -m train --config=configs/pixart_lcm_lora.py --workdir=runs/lcm_lora

The result: `export/` is the merged pipeline, `export/lora/pytorch_lora_weights.safetensors` the
adapter for diffusers, `export/lora/peft/` the same for PEFT.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("tiny", "smoke", *common.PIXART)
TARGETS = (
    r"(.*/)?(to_q|to_k|to_v|to_out_0|net_0/proj|net_2|proj|proj_out|linear|linear_1|linear_2)/kernel",
)


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    if variant in common.PIXART:
        return xl(variant)
    config = tiny()
    return smoke(config) if variant == "smoke" else config


def published():
    """What PixArt's script says; the variants change what they must."""
    config = common.run("train.tasks:distill")
    config.name = "lcm_lora"
    config.steps = 5000
    config.batch_size = 32
    config.ema_decay = 0.95
    config.null = "empty_prompt"
    config.lora = ConfigDict({"rank": 32, "alpha": 8.0, "targets": TARGETS})
    config.optimizer = common.adamw(
        learning_rate=2e-5, schedule="constant", warmup_steps=100, weight_decay=0.0, clip_norm=1.0
    )
    config.schedule = common.betas("linear", 1e-4, 0.02)
    config.objective = ConfigDict()
    config.objective.prediction = "epsilon"
    config.objective.omega = 4.5
    config.objective.num_ddim_steps = 50
    config.objective.loss = "pseudo_huber"
    config.objective.huber_c = 1e-3
    config.data = common.any_data()
    config.data.buckets = False
    config.log_every = 10
    config.save_every = 200
    config.sample_every = 500
    return config


def tiny():
    config = published()
    config.teacher_path = "{assets}/pixart_tiny"
    config.dtype = "float32"
    config.matmul_precision = "auto"
    config.lora = ConfigDict({"rank": 4, "alpha": 4.0, "targets": TARGETS})
    config.data.size = 64
    config.data.max_length = 24
    config.steps = 800
    config.save_every = 100
    config.sample_every = 100
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=20, final_scale=0.1)
    config.objective.prediction = "v_prediction"
    config.report = common.student_report()
    return config


def smoke(config):
    """A few steps, to test the plumbing."""
    config.report = None
    return common.short(config, steps=4, save_every=2)


def xl(variant):
    config = published()
    config.teacher_path = common.PIXART[variant]
    return common.large(config, common.PIXART_SIZES[variant], max_length=120)
