r"""The embedded PixArt: a tiny VAE, T5 and DiT trained on emoji scenes, from nothing.

PixArt-alpha (arXiv 2310.00426): DiT with adaLN-single and cross-attention to T5, linear betas from
1e-4 to 0.02. Five stages, each in its own directory below `--workdir`:

  vae      AutoencoderKL, 4x down, 8 latent channels. L1 + L2 + edges + KL, no adversary.
  decoder  The same with its encoder fixed, as Stable Diffusion's VAEs were finished: the latents
           stay what they are, the pictures get sharper.
  teacher  DiT, 64 tokens of 64 px pictures, and its T5 encoder trained along.
  relations  The same trained on with more scenes of several things whose caption names their
           relation, at noise levels where the layout is decided, while linear heads make T5 tell
           the order of the words (`train.word_order`).
  layout   The same trained on while a linear head makes the picture tokens tell which concept
           stands where (`train.layout`): it binds the words to the places.

What differs from the paper, and why:
  - T5 is trained with the DiT: a frozen XXL encoder (4.8 B parameters) does not fit two cores.
  - v-prediction without a learned variance: at the last step the signal is 0.6 % of x, where the
    error of a noise prediction is multiplied by 157.
  - timesteps are logit-normal about t = 378 (arXiv 2403.03206): at 16x16 latents half of a uniform
    draw falls where only a blur of the layout can be seen. Each picture is encoded once and noised
    twice. Products take bfloat16 factors where that is faster (`cnxs_jax.precision`).
  - 10 % of the captions become the empty prompt (the paper: a learned null caption), so that
    guidance works in diffusers, whose layout has no place for that caption.

Run:
  python -m train --config=configs/pixart.py --workdir=runs/pixart           # :tiny, shipped
  python -m train --config=configs/pixart.py:smoke --workdir=runs/smoke      # tests the plumbing
  python -m train --config=configs/pixart.py --workdir=runs/pixart --resume  # go on
On Linux faster with the allocator kept from giving its pages back in every step:
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8000000000:\
glibc.malloc.trim_threshold=16000000000 python -m train ...
The result, a diffusers directory, is `runs/pixart/layout/export`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("tiny", "smoke")


def get_config(variant="tiny"):
    """`:tiny` (default) makes what `cnxs_jax/assets/pixart_tiny/README.md` describes."""
    common.check(variant, VARIANTS)
    config = ConfigDict()
    config.stages = ("vae", "decoder", "teacher", "relations", "layout")
    config.vae = vae()
    config.decoder = decoder()
    config.teacher = teacher()
    if variant == "smoke":
        smoke(config)
    config.relations = relations(config.teacher)
    config.layout = layout(config.relations)
    if variant == "smoke":  # the last stage does all that the one before it does
        config.stages = ("vae", "decoder", "teacher", "layout")
        config.layout.init_path = "{workdir}/teacher/export"
        del config.relations
    return config


def stage(name, task):
    """What all stages share."""
    config = common.run(task)
    config.name = name
    config.data = common.data()
    config.data.size = 64
    config.matmul_precision = "auto"
    config.log_every = 50
    config.save_every = 500
    config.sample_every = 2000
    return config


def vae():
    config = stage("vae", "train.tasks:autoencoder")
    config.steps = 2400
    config.batch_size = 16
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.final_scale = 0.02
    config.optimizer.clip_norm = 1.0
    config.vae = ConfigDict()
    config.vae.block_out_channels = (16, 32, 64)
    config.vae.layers_per_block = 1
    config.vae.latent_channels = 8
    config.vae.norm_num_groups = 8
    config.vae.mid_block_add_attention = False
    config.objective = ConfigDict()
    config.objective.l2 = 0.5
    config.objective.edge = 1.0
    config.objective.kl = 1e-3  # only keeps the latents' spread near 1
    return config


def decoder():
    config = vae()
    config.name = "decoder"
    del config.vae
    config.vae_path = "{workdir}/vae/export/vae"
    config.freeze = ("encoder/.*", "quant_conv/.*")
    config.steps = 1500
    config.objective.kl = 0.0
    return config


def teacher():
    config = stage("teacher", "train.tasks:denoiser")
    config.data.tokenizer = "{assets}/pixart_tiny/tokenizer"
    config.data.max_length = 24
    config.vae_path = "{workdir}/decoder/export/vae"
    config.steps = 12000
    config.batch_size = 32
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.caption_dropout = 0.1
    config.optimizer = common.adamw(
        learning_rate=1.5e-3, schedule="cosine", warmup_steps=300, final_scale=0.02, b2=0.99,
        weight_decay=0.01, clip_norm=1.0,
    )  # fmt: skip
    config.transformer = ConfigDict()
    config.transformer.num_layers = 6
    config.transformer.num_attention_heads = 3
    config.transformer.attention_head_dim = 64
    config.transformer.cross_attention_dim = 192
    config.transformer.caption_channels = 128
    config.transformer.in_channels = 8
    config.transformer.out_channels = 8  # no learned variance
    config.transformer.patch_size = 2
    config.transformer.sample_size = 16
    config.text_encoder = ConfigDict()
    config.text_encoder.vocab_size = 192
    config.text_encoder.d_model = 128
    config.text_encoder.d_kv = 32
    config.text_encoder.num_heads = 4
    config.text_encoder.d_ff = 256
    config.text_encoder.num_layers = 2
    config.schedule = common.betas("linear", 1e-4, 0.02)
    config.objective = ConfigDict()
    config.objective.prediction = "v_prediction"
    config.objective.loss_weighting = "uniform"
    config.objective.logit_normal = (-0.5, 1.0)
    config.objective.noises = 2
    return config


def relations(teacher):
    config = teacher.copy_and_resolve_references()
    config.name = "relations"
    config.init_path = "{workdir}/teacher/export"
    config.data.relations = 0.7
    config.word_order = 0.1
    config.data.seed = 1
    config.steps = max(teacher.steps // 4, 3)
    config.optimizer.learning_rate = 1e-3
    config.objective.logit_normal = (0.5, 1.2)
    return config


def layout(relations):
    config = relations.copy_and_resolve_references()
    config.name = "layout"
    config.init_path = "{workdir}/relations/export"
    config.data.relations = 0.5
    config.data.seed = 2
    config.layout = 0.2
    config.steps = 5 * relations.steps // 3
    config.objective.logit_normal = (0.2, 1.2)
    return config


def smoke(config):
    """Shrinks all stages to a few steps of the smallest networks, to test the plumbing."""
    for stage in (config.vae, config.decoder, config.teacher):
        common.short(stage, steps=6, save_every=3)
        stage.data.size = 32
    config.vae.vae.block_out_channels = (8, 8, 8)
    config.teacher.transformer.num_layers = 2
    config.teacher.transformer.num_attention_heads = 2
    config.teacher.transformer.attention_head_dim = 16
    config.teacher.transformer.cross_attention_dim = 32
    config.teacher.transformer.caption_channels = 16
    config.teacher.transformer.sample_size = 8
    config.teacher.text_encoder.d_model = 16
    config.teacher.text_encoder.d_kv = 8
    config.teacher.text_encoder.num_heads = 2
    config.teacher.text_encoder.d_ff = 32
