r"""PixArt-delta's latent consistency distillation (arXiv 2401.05252, section 3.1, algorithm 1).

A student that draws in four steps, without guidance, what its teacher draws in fifty with it: it
starts as a copy of the teacher and learns to agree with its own average one teacher step (k = 20
of 1000) further on. Guidance is part of what is learned: omega = 4.5, Imagen's scale 5.5.

  :tiny     the embedded teacher, 64 px, two CPU cores, minutes (the default)
  :smoke    four steps of it, to test the plumbing
  :xl_256   PixArt-XL/2, 256 px, 611 M parameters
  :xl_512   the same at 512 px
  :xl_1024  the same at 1024 px, with micro-conditioning

Published figures (PixArt-delta, table 1 and section 4): AdamW 2e-5, EMA 0.95, N = 50, k = 20,
omega = 4.5, batch 24 (two V100 with 12 each), about 5,000 iterations, within a day, 32 GB.

Where this recipe differs from the paper (P) or the released script (S), and why:
  - learning rate: P says 2e-5. S multiplies it by sqrt(batch / 256): 6.1e-6 at batch 24. Here P.
  - S drops 10 % of the student's captions by accident (its class_dropout_prob is never passed on)
    while the target sees them. Here none are dropped.
  - S loses all but the last micro-batch when it accumulates gradients. Here they are averaged.
  - S computes in float16; here bfloat16 with float32 parameters, solver and loss.
  - S takes PixArt's learned null caption under the prompt's mask. diffusers' directories lack that
    caption, so `null = "empty_prompt"` is the default; set "learned" for a teacher converted from
    PixArt's own .pth.
  - clipping at 0.01, Adam's epsilon 1e-10, 100 steps of warm-up: as S; P does not say.
  - :tiny predicts v (its teacher does), takes omega = 2 (scale 3; between 2 and 4.5 it
    finds as many objects) and learns at 3e-4 with clipping at 1: the published values belong to a
    network a hundred times larger trained ten times longer.

Run:
  python -m train --config=configs/pixart_lcm.py --workdir=runs/lcm

On a TPU slice (all hosts; parameters, moments and EMA are split over the devices):
  hf download PixArt-alpha/PixArt-XL-2-512x512 --local-dir PixArt-XL-2-512x512
  python -m train --config=configs/pixart_lcm.py:xl_512 --workdir=gs-mount/lcm_512 \
      --config.teacher_path=PixArt-XL-2-512x512 --distributed
For :xl_256 and :xl_1024 take PixArt-XL-2-256x256 and PixArt-XL-2-1024-MS. On your own pictures
(photos/a.jpg beside photos/a.txt, or metadata.jsonl), in PixArt's 40 aspect ratios:
  --config.data.source=image_folder --config.data.root=photos --config.data.buckets=True
What a variant takes, on any machine: python -m train.plan --config=configs/pixart_lcm.py:xl_512
Features encoded once (the cache is refused when it is stale), `--shard=i/n` on n machines:
  python -m train.cache --config=configs/pixart_lcm.py:xl_512 --out=features --shard=0/8 \
      --config.data.source=coco_captions --config.data.root=tfds
  and then --config.data.source=features --config.data.root=features
The result, a diffusers directory with an LCMScheduler, is `--workdir`/export.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("tiny", "smoke", *common.PIXART)


def get_config(variant="tiny"):
    """The recipe of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    if variant in common.PIXART:
        return xl(variant)
    config = tiny()
    return smoke(config) if variant == "smoke" else config


def published():
    """What the paper and its script say; the variants change what they must."""
    config = common.run("train.tasks:distill")
    config.name = "lcm"
    config.steps = 5000
    config.batch_size = 24
    config.ema_decay = 0.95
    config.null = "empty_prompt"
    config.optimizer = common.adamw(
        learning_rate=2e-5, schedule="constant", warmup_steps=100, eps=1e-10, weight_decay=0.0,
        clip_norm=0.01,
    )  # fmt: skip
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
    config.freeze = ()  # patterns of parameters that stay the teacher's
    return config


def tiny():
    config = published()
    config.teacher_path = "{assets}/pixart_tiny"
    config.dtype = "float32"
    config.matmul_precision = "auto"
    config.data.size = 64
    config.data.max_length = 24
    config.steps = 400
    config.batch_size = 32
    config.save_every = 100
    config.sample_every = 100
    config.optimizer.update(
        learning_rate=3e-4, schedule="cosine", warmup_steps=20, final_scale=0.1, clip_norm=1.0
    )
    config.objective.prediction = "v_prediction"
    config.objective.omega = 2.0
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
