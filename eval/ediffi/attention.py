"""(b) How much is the text attended to at each noise level, and when does it stop to matter?

Attention: the share that goes to text tokens and not to the null token, over all cross-attentions,
pixels and heads of the base, on noised real pictures (arXiv 2211.01324, figure 2). Switch: one
prompt up to a fraction of the steps, another one after it; what is found in the end.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import with_article
from cnxs_jax.diffusion import edm, expert_tree, sampling
from cnxs_jax.models.conditioning import MASKS, dropped
from cnxs_jax.pipelines.cascade import Stage, draw_stage
from cnxs_jax.pipelines.ediffi import encode
from cnxs_jax.pipelines.images import to_uint8
from eval import ask
from eval.ediffi import encoders
from eval.metrics import bootstrap
from train.tasks_ediffi import shrunk

LEVELS = (0.01, 0.03, 0.08, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 80.0)
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def text_share(module, params, x, c_noise, cond):
    """Share of the cross-attention that goes to text tokens, [B], over all layers and heads."""

    def projections(layer, method):
        return layer.name in ("to_q", "to_k", "context") and method == "__call__"

    _, kept = module.apply(
        {"params": params}, x, c_noise, cond,
        capture_intermediates=projections, mutable=["intermediates"],
    )  # fmt: skip
    kept = kept["intermediates"]
    _, mask = kept["context"]["__call__"][0]
    width, masses = module.attention_head_dim, []
    for block in kept.values():
        if "attn2" not in block:
            continue
        q, k = (block["attn2"][side]["__call__"][0] for side in ("to_q", "to_k"))
        heads = max(q.shape[-1] // width, 1)
        q, k = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(mask[:, None, None] > 0, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        masses.append(1.0 - weights[..., -module.num_null_tokens :].sum(-1).mean((1, 2)))
    return jnp.stack(masses).mean(0)


def attention(stage, batch, levels=LEVELS):
    """Rows over noise levels: the owner, the share of text, the effect of text on the prediction.

    Args:
        batch: {"x" [B,H,W,3], "cond"}, real pictures with their captions.
    """
    edges = expert_tree.edges(stage.intervals, stage.levels)
    rows = []
    for n, sigma in enumerate(levels):
        owner = int(np.searchsorted(edges, sigma, side="right"))
        module, params = stage.experts[owner]
        level = jnp.full(batch["x"].shape[:1], sigma, jnp.float32)
        noise = jax.random.normal(jax.random.key(n), batch["x"].shape)
        share, effect = at_level(module, params, batch, level, noise, stage.sigma_data)
        rows.append({"sigma": sigma, "expert": stage.intervals[owner].name,
                     "attention to text": bootstrap.mean(np.asarray(share)),
                     "effect of text": bootstrap.mean(np.asarray(effect))})  # fmt: skip
    return rows


@functools.partial(jax.jit, static_argnames=("module", "sigma_data"))
def at_level(module, params, batch, sigma, noise, sigma_data):
    """(share of attention, |D(text) - D(null)| / |D(text)|), [B] each, at noise levels [B]."""
    x, c_noise = edm.network_input(batch["x"], noise, sigma, sigma_data)
    share = text_share(module, params, x, c_noise, {**batch["cond"], "sigma": sigma})
    noised = batch["x"] + sigma[:, None, None, None] * noise
    predict = functools.partial(
        edm.precondition(sampling.denoiser(module), sigma_data), params, noised, sigma
    )
    told = predict(batch["cond"])
    untold = predict({**batch["cond"], **dropped(batch["cond"])})
    return share, norm(told - untold) / norm(told)


def norm(x_BxHxWxC):
    """Euclidean norm of each picture, [B]."""
    return jnp.sqrt(jnp.square(x_BxHxWxC).sum((1, 2, 3)))


def real_batch(pipe, number, seed):
    """Encoded real scenes at the base's size with their captions; no reference picture."""
    scenes = [
        emoji_scenes.make_scene(np.random.default_rng([seed, n]), split="test", truth=False)
        for n in range(number)
    ]
    pictures = jnp.asarray(np.stack([s["image"] for s in scenes]), jnp.float32) / 127.5 - 1.0
    tokens = pipe.tokens([s["caption"] for s in scenes])
    cond = encode(pipe.encoders, pipe.encoder_params, tokens)
    return {"x": shrunk(pictures, pipe.stages[0].size), "cond": cond}


# --- the prompt is switched while the picture is drawn ---------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Switched(Stage):
    """A base that draws with `first` up to the row `cut` and with `second` from there on."""

    first: object = None
    second: object = None
    cut: int = 0

    def draw(self, noise, cond, steps=None):
        """The condition that the cascade made is not read."""
        table = expert_tree.route(self.sampler.table(steps), self.intervals, self.levels)
        number = len(self.experts)
        owners = tuple(e + number * (i >= self.cut) for i, e in enumerate(table.expert))
        modules, params = zip(*self.experts, strict=True)
        conds = (self.first,) * number + (self.second,) * number
        return draw_stage(
            modules * 2, params * 2, noise, conds, dataclasses.replace(table, expert=owners),
            self.sigma_data, self.sampler.threshold,
        )  # fmt: skip


def guided_cond(pipe, prompts):
    """The condition of prompts with what guidance reads, at the base's own scale."""
    cond = encode(pipe.encoders, pipe.encoder_params, pipe.tokens(prompts))
    scale = jnp.full((len(prompts),), pipe.stages[0].sampler.guidance_scale, jnp.float32)
    return {**cond, "null": dropped(cond), "guidance_scale": scale}


def switched(pipe, first, second, cut, seed):
    """uint8 pictures; the larger sizes get no text, so that the base alone says what is seen."""
    bare, made = encoders.without(pipe, *MASKS), []
    own = {f.name: getattr(pipe.stages[0], f.name) for f in dataclasses.fields(Stage)}
    for start in range(0, len(first), ask.BATCH):
        part = slice(start, start + ask.BATCH)
        conds = [guided_cond(pipe, prompts[part]) for prompts in (first, second)]
        stages = (Switched(**own, first=conds[0], second=conds[1], cut=cut), *pipe.stages[1:])
        seeds = [(seed, n) for n in range(start, start + len(first[part]))]
        images = dataclasses.replace(bare, stages=stages)(
            first[part], seed=seeds, output_type="np"
        ).images
        made.append(to_uint8(images))
    return np.concatenate(made)


def switching(pipe, number, seed, fractions=FRACTIONS):
    """Rows over the fraction of the steps before the switch, and the first pictures of each."""
    pairs = [ask.several(np.random.default_rng([seed, n]), 2) for n in range(number)]
    words = [[pair[i] for pair in pairs] for i in (0, 1)]
    first, second = ([with_article(word) for word in side] for side in words)
    steps = pipe.stages[0].sampler.steps
    images = {
        f: switched(pipe, first, second, math.ceil(f * steps - 1e-9), seed) for f in fractions
    }
    kept, rows = images[max(fractions)].astype(np.float32), []
    for fraction, made in images.items():
        found = ask.seen(made)
        moved = np.abs(made - kept).mean((1, 2, 3))
        rows.append(
            {"switched after": math.ceil(fraction * steps - 1e-9) / steps,
             "change, of 255": bootstrap.mean(moved)}
            | ask.shares(**{
                name: [ask.best(f, w) is not None for f, w in zip(found, side, strict=True)]
                for name, side in (("first prompt found", words[0]), ("second", words[1]))
            })
        )  # fmt: skip
    return rows, {str(f): made[:8] for f, made in images.items()}


def study(pipe, number, seed):
    """Both parts; the pictures are those of the switch."""
    levels = attention(pipe.stages[0], real_batch(pipe, min(number, ask.BATCH), seed))
    order = scipy.stats.spearmanr(
        [row["sigma"] for row in levels], [row["attention to text"]["value"] for row in levels]
    )
    rows, shown = switching(pipe, number, seed)
    note = f"Spearman of noise level and attention to text: {order.statistic:.3f}"
    found = {"levels": levels, "rows": rows, "notes": [note]}
    return found, {"prompts": [""] * 8, "images": shown}
