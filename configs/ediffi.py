r"""eDiff-I (arXiv 2211.01324): a shared denoiser, then experts branched off it, and the cascade.

Pixel-space denoisers in EDM form (preconditioning, log-normal noise, loss weight of arXiv
2206.00364), conditioned on T5 and CLIP text and, as style, on CLIP pictures. A base model is
trained on all noise levels and then copied into experts, each trained on its interval of a binary
tree over the noise distribution; super-resolution stages follow.

  :tiny     the base at 16 px on emoji scenes: shared model, two experts (the default)
  :cascade  the same with super-resolution to 32 and 64 px
  :shipped  the cascade with one base model, trained for longer, instead of experts
  :three    :tiny with three experts: a low one, a high one and the rest, as the paper's
  :no_margin  :three, each expert trained on its own levels alone
  :halves   :tiny with uniform intervals: two experts of half of the levels each
  :quarters the same with four of a quarter each
  :shared   :tiny without experts: one model on as many samples, to compare with
  :deeper   :shared with twice as many blocks a level, at their cost of sampling
  :updates  :shared in the experts' smaller batches, for about as many updates as all of them make
  :mixed    :shared on the noise levels that the unequal shares of :tiny's experts amount to
  :mixed_three  the same of :three's
  :parallel :three with its experts side by side, in equal shares, one a group of devices
            (--config.experts.mesh.expert=3) or in turn on one
  :smoke    three steps of a smaller cascade to 32 px without CLIP, to test the plumbing
            (pytest -m slow tests/train/test_ediffi.py)
  :paper    64 -> 256 -> 1024 px at about the published size

What is the paper's and what is not. No code or weights were ever released. The tree (E[3,0],
E[9,511] and their complement), the three encoders with independent dropout, the EDM form and the
crops of the 1024 px stage are the paper's as public summaries have them; widths, depths, dropout
rates, batch sizes and learning rates are ours. :paper has 583 M, 403 M and 155 M parameters; the
paper's three networks 1.07 B, 300 M and 170 M, which is second hand. BSRGAN degradations of the
low-resolution picture are left out; it gets Gaussian noise of a level that the network reads.

What differs in :tiny and :three, and why:
  - the tree of :tiny is E[3,0] and the rest (sigma above 0.076, seven eighths of the levels): of
    the trees that were trained, the one that reaches the aims of the losses and finds more of the
    objects. :three has a right edge of E[2,3] (sigma above 0.68, a quarter of the levels) as well,
    not E[9,511] (above 9.6, 1/512): a run of minutes would hardly see the latter.
  - the branches get 6 and 26 (6, 13 and 13) of every 32 pictures that one model would get, in
    smaller batches: an expert of some levels would else be updated as often as one of all. Pictures
    are encoded once and noised twice. An expert is trained on 1/16 of the levels beyond each of its
    edges, too: near them it is worst (docs/results/ediff_i.md has the figures, without margin and
    of other trees).
  - the super-resolution stages are UNets with blocks at the full resolution (`super_resolution`
    says why), and their low-resolution picture gets little noise.
  - T5 is the embedded PixArt's, CLIP that of `configs/scene_clip.py`, both shipped and frozen;
    other ones are given to every stage (`text_path`, `clip_path`).

Run:
  python -m train --config=configs/ediffi.py --workdir=runs/ediffi            # :tiny
  python -m train --config=configs/ediffi.py --workdir=runs/ediffi --resume   # go on, any stage
`runs/ediffi/report.md` holds the held-out loss of every noise interval, `runs/ediffi/export` the
pipeline: cnxs_jax.load_pipeline("runs/ediffi/export")("a tiger").

For :paper, T5-XXL and its tokenizer are those of any PixArt-alpha pipeline; CLIP is cut in two by
  for part in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection): ...
      part.from_pretrained("openai/clip-vit-large-patch14").save_pretrained(directory)
into `clip_text_encoder` and `clip_image_encoder`, with `clip_tokenizer` beside them.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

VARIANTS = (
    "tiny",
    "cascade",
    "shipped",
    "three",
    "no_margin",
    "halves",
    "quarters",
    "shared",
    "deeper",
    "updates",
    "mixed",
    "mixed_three",
    "parallel",
    "smoke",
    "paper",
)
THREE_TREE = ((3, 0), (2, 3))
PAPER_TREE = ((3, 0), (9, 511))
EXPERTS = ("low", "middle", "high")
# Each expert's name, pictures of every 32, batch size, margin (1/16 of all levels at either side).
THREE = (("low", 6, 6, 1 / 2), ("middle", 13, 8, 1 / 10), ("high", 13, 8, 1 / 4))
ENSEMBLES = {
    "tiny": (((3, 0),), (("low", 6, 6, 1 / 2), ("high", 26, 8, 1 / 14))),
    "three": (THREE_TREE, THREE),
    "no_margin": (THREE_TREE, tuple((*expert[:3], 0.0) for expert in THREE)),
    "halves": (((1, 0), (1, 1)), tuple((name, 16, 8, 1 / 8) for name in ("low", "high"))),
    "quarters": (
        ((2, 0), (2, 1), (2, 2), (2, 3)),
        tuple((name, 8, 8, 1 / 4) for name in ("low", "middle", "upper", "high")),
    ),
}
MIXES = {"mixed": "tiny", "mixed_three": "three"}
ENSEMBLES["parallel"] = ENSEMBLES["smoke"] = ENSEMBLES["three"]


def get_config(variant="tiny"):
    """The plan of one variant of `VARIANTS`."""
    common.check(variant, VARIANTS)
    if variant == "paper":
        return paper()
    config = ensemble(*ENSEMBLES.get(variant, ENSEMBLES["tiny"]))
    if variant in ("shared", "shipped", "deeper", "updates", *MIXES):
        longer(config, variant)
    if variant in ("cascade", "shipped", "smoke"):
        config.sr32 = super_resolution(16, 32)
        config.stages = (*config.stages, "sr32")
    if variant in ("cascade", "shipped"):
        config.sr64 = super_resolution(32, 64)
        config.stages = (*config.stages, "sr64")
    if variant == "parallel":
        parallel(config)
    return smoke(config) if variant == "smoke" else config


def stage():
    """What every stage of every variant shares."""
    config = common.run("train.tasks_ediffi:stage")
    config.ema_decay = 0.9999
    config.ema_warmup = False
    config.log_every = 50
    config.parent = config_dict.placeholder(str)
    config.tree = config_dict.placeholder(tuple)
    config.expert = config_dict.placeholder(int)
    config.mix = config_dict.placeholder(tuple)
    config.margin = 0.0
    config.text_path = config_dict.placeholder(str)
    config.clip_path = config_dict.placeholder(str)
    config.low_res_size = config_dict.placeholder(int)
    config.crop = config_dict.placeholder(int)
    config.data = common.data()
    config.data.root = config_dict.placeholder(str)
    config.optimizer = common.adamw(
        learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.01, clip_norm=1.0
    )
    config.levels = ConfigDict({"mean": -1.2, "std": 1.2, "scale": 1.0})
    config.objective = ConfigDict()
    config.objective.dropout = ConfigDict({"text": 0.25, "clip_text": 0.2, "clip_image": 0.9})
    config.sampler = ConfigDict()
    config.sampler.solver = "deis"
    config.sampler.order = 3
    config.sampler.steps = 25
    config.sampler.sigma_min = 0.002
    config.sampler.sigma_max = 80.0
    config.sampler.rho = 7.0
    config.sampler.guidance_scale = 5.0
    config.sampler.threshold = 0.995
    config.sampler.noise_level = config_dict.placeholder(float)
    return config


def joined(num_heldout=512):
    """What joins the stages, and how finely it looks at the noise levels."""
    config = ConfigDict()
    config.task = "train.ediffi_finish:cascade"
    config.num_heldout = num_heldout
    config.noises = 2
    config.num_pictures = 16
    config.quantiles = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)
    return config


def ensemble(tree, experts):
    """A shared model and its experts, as `ENSEMBLES` has them."""
    config = ConfigDict()
    config.cpu_devices = 2  # it divides every batch
    config.stages = ("shared",)
    config.shared = tiny_base(steps=1000, batch_size=32)
    for i, (name, share, batch, margin) in enumerate(experts):
        config.stages = (*config.stages, name)
        config[name] = branch(tiny_base(1000 * share // batch, batch), tree, i)
        config[name].margin = margin
    config.finish = joined()
    return config


def tiny_stage(steps, batch_size):
    """What the embedded stages share."""
    config = stage()
    config.text_path = "{assets}/pixart_tiny"
    config.clip_path = "{assets}/scene_clip"
    config.matmul_precision = "auto"
    config.steps = steps
    config.batch_size = batch_size
    config.save_every = 300
    config.sample_every = 500
    config.ema_decay = 0.995
    config.data.size = 64
    config.data.max_length = 24
    config.optimizer.update(
        learning_rate=1e-3, schedule="cosine", warmup_steps=100, final_scale=0.02, b2=0.99
    )
    config.unet = ConfigDict()
    config.unet.attention_head_dim = 32
    config.unet.cross_attention_dim = 96
    config.unet.norm_num_groups = 8
    config.unet.text_dim = 128
    config.unet.clip_text_dim = 128
    config.unet.clip_image_dim = 128
    config.unet.pooled_dim = 128
    config.objective.noises = 2
    config.objective.dropout = ConfigDict({"text": 0.1, "clip_text": 0.2, "clip_image": 0.8})
    config.sampler.guidance_scale = 3.0
    return config


def tiny_base(steps, batch_size):
    """16 px; the shared model keeps its learning rate, its branches let it fall."""
    config = tiny_stage(steps, batch_size)
    config.size = 16
    config.unet.block_out_channels = (32, 64)
    config.unet.layers_per_block = (1, 2)
    config.unet.self_attention = (False, True)
    config.unet.cross_attention = (False, True)
    config.optimizer.schedule = "constant"
    return config


def branch(config, tree, expert):
    """A stage that starts as the shared model and trains one expert of `tree`.

    With a seed of its own: it would draw its parent's pictures and noises again.
    """
    config.seed = 1 + (expert or 0)
    config.parent = "{workdir}/shared"
    config.tree = tree
    config.expert = expert
    config.optimizer.schedule = "cosine"
    return config


def super_resolution(low_res_size, size):
    """A UNet on crops: no self-attention, cross-attention at the coarser level.

    It has blocks at the full resolution: an Efficient-UNet of this width, as `:paper` has it, puts
    the 24 numbers of a place at half the resolution through too few channels, and leaves noise.
    """
    config = tiny_stage(*((2000, 32) if size == 32 else (1500, 16)))
    config.size = size
    config.low_res_size = low_res_size
    config.crop = size // 2
    config.unet.low_res_channels = 3
    config.unet.block_out_channels = (32, 64)
    config.unet.layers_per_block = (2, 1)
    config.unet.self_attention = (False, False)
    config.unet.cross_attention = (False, True)
    config.objective.max_low_res_noise = 0.1
    config.sampler.steps = 10
    config.sampler.guidance_scale = 1.0
    config.sampler.noise_level = 0.02
    config.ema_warmup = True
    return config


def longer(config, variant):
    """One model instead of experts, on as many samples; the shipped one on three times as many."""
    steps = {"updates": 4000, "shipped": 3000}.get(variant, 1000)
    batch = 8 if variant == "updates" else 32
    config.stages = ("shared", "longer")
    config.longer = branch(tiny_base(steps, batch), None, None)
    if variant in MIXES:
        tree, experts = ENSEMBLES[MIXES[variant]]
        config.longer.tree = tree
        config.longer.mix = tuple(pictures for _, pictures, _, _ in experts)
        set_margins(config.longer, experts)
    if variant == "deeper":
        for name in config.stages:
            config[name].unet.layers_per_block = (2, 4)
    drop_experts(config)


def parallel(config):
    """One stage for all experts, each with a third of the batch."""
    config.stages = ("shared", "experts")
    config.experts = branch(tiny_base(steps=1000, batch_size=33), THREE_TREE, None)
    set_margins(config.experts, THREE)
    drop_experts(config)
    del config.cpu_devices  # an expert's third of the batch is odd


def set_margins(stage, experts):
    """One margin an expert in a stage that trains the levels of all."""
    with stage.ignore_type():
        stage.margin = tuple(margin for _, _, _, margin in experts)


def drop_experts(config):
    for name in set(EXPERTS) & set(config):
        del config[name]


def smoke(config):
    """Shrinks everything, to test the plumbing."""
    for name in config.stages:
        stage = config[name]
        common.short(stage, steps=3, save_every=3)
        stage.optimizer.warmup_steps, stage.optimizer.schedule = 1, "constant"
        stage.unet.block_out_channels = (8,) * len(stage.unet.block_out_channels)
        stage.unet.layers_per_block = (1,) * len(stage.unet.layers_per_block)
        stage.unet.attention_head_dim, stage.unet.cross_attention_dim = 8, 16
        stage.unet.norm_num_groups = 4
        stage.unet.clip_text_dim, stage.unet.clip_image_dim, stage.unet.pooled_dim = 16, 16, 16
        stage.sampler.steps = 3
        stage.clip_path = None
        stage.unet.efficient = stage.low_res_size is not None  # as in :paper
    config.finish.num_heldout, config.finish.noises, config.finish.num_pictures = 16, 1, 8
    config.finish.quantiles = (0.5,)
    return config


def paper():
    """About the published sizes; pictures from a folder, encoders from their hub directories."""
    config = ConfigDict()
    config.stages = ("shared", *EXPERTS, "sr256", "sr256_low", "sr256_high", "sr1024")
    config.shared = paper_base(500_000)
    for i, name in enumerate(EXPERTS):
        config[name] = branch(paper_base(100_000), PAPER_TREE, i)
    config.sr256 = paper_stage(256, 64, 500_000)
    for i, name in enumerate(("sr256_low", "sr256_high")):
        child = branch(paper_stage(256, 64, 100_000), ((1, 0), (1, 1)), i)
        child.parent = "{workdir}/sr256"
        config[name] = child
    config.sr1024 = paper_stage(1024, 256, 500_000)
    config.finish = joined(num_heldout=4096)
    return config


def published(size, steps):
    """What the stages of :paper share."""
    config = stage()
    config.steps = steps
    config.batch_size = 2048
    config.save_every = 1000
    config.sample_every = 10_000
    config.size = size
    config.data.source = "image_folder"
    config.data.root = "photos"
    config.data.size = size
    config.data.max_length = 113
    config.text_path = "PixArt-XL-2-512x512"
    config.clip_path = "clip-vit-large-patch14"
    config.optimizer.warmup_steps = 10_000
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.unet = ConfigDict()
    config.unet.dtype = "bfloat16"
    return config


def paper_base(steps):
    """An ADM UNet: attention at 32, 16 and 8 px."""
    config = published(64, steps)
    config.data.size = 256  # CLIP reads 224 px: a reference is not seen at 64
    config.unet.block_out_channels = (256, 512, 1024, 1024)
    config.unet.layers_per_block = (3, 3, 3, 3)
    config.unet.self_attention = (False, True, True, True)
    config.unet.cross_attention = (False, True, True, True)
    return config


def paper_stage(size, low_res_size, steps):
    """An Efficient-UNet; the 1024 px one has no self-attention and sees crops of 256 px."""
    config = published(size, steps)
    config.low_res_size = low_res_size
    config.crop = 256 if size == 1024 else None
    config.unet.efficient = True
    config.unet.low_res_channels = 3
    config.unet.block_out_channels = (128, 256, 512, 1024 if size == 256 else 512)
    config.unet.layers_per_block = (1, 2, 4, 4)
    config.unet.self_attention = (False, False, False, size == 256)
    config.unet.cross_attention = (False, False, False, True)
    config.levels.scale = 4.0  # of the only public JAX relative; the paper's is not known
    config.objective.max_low_res_noise = 0.5
    config.sampler.steps = 10 if size == 256 else 5
    config.sampler.sigma_max = 320.0
    config.sampler.guidance_scale = 4.0 if size == 256 else 1.0
    config.sampler.noise_level = 0.1
    return config
