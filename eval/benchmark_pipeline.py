"""Text encoding and few-step sampling in one program, for `python -m eval.benchmark` on a GPU.

T5-XXL's encoder, then PixArt-XL/2 at 1024 px with its sizes as conditions and LCM's steps without
guidance: what a call of the pipeline does before the decoder. About 22 GB of float32 weights a
side on the host; in bfloat16 about 11 GB a side on the card.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import rules
from cnxs_jax.diffusion import sampling, schedule, solvers
from eval import closed_forms
from eval.benchmark_case import Case, normal
from eval.benchmark_networks import PIXART_TINY, T5, PixArt, lcm_loop, no_grad

# The sizes' embedding is a third of the width each.
SIZES = {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 96}
CLASSES = {"text": "T5EncoderModel", "transformer": "PixArtTransformer2DModel"}


class PixArtWithText(Case):
    """Parameters {"text": ..., "transformer": ...}."""

    full = {
        "text": T5.full | {"num_layers": 24},
        "transformer": PixArt.full | {"sample_size": 128, "use_additional_conditions": True},
    }
    tiny = {
        "text": T5.tiny | {"tokens": 20},
        "transformer": PIXART_TINY | SIZES,
    }

    def build(self):
        self.parts = {k: {**self.config[k]} for k in CLASSES}
        self.given = {"tokens": [c.pop("tokens") for c in self.parts.values()][0]}
        built = {k: self.network_of(name, self.parts[k]) for k, name in CLASSES.items()}
        self.modules = {k: module for k, (module, _, _) in built.items()}
        self.shapes = {k: shapes for k, (_, shapes, _) in built.items()}
        self.tables = {k: table for k, (_, _, table) in built.items()}

    def torch_class(self):
        import diffusers
        import torch
        import transformers

        text = transformers.T5EncoderModel(transformers.T5Config(**self.parts["text"]))
        transformer = diffusers.PixArtTransformer2DModel(**self.parts["transformer"])
        return torch.nn.ModuleDict({"text": text, "transformer": transformer})

    def params(self, model):
        found = {}
        for k, table in self.tables.items():
            tensors = {n: v.detach().cpu().numpy() for n, v in model[k].state_dict().items()}
            found[k] = self.cast(rules.to_params(tensors, self.shapes[k], table))
        return found

    def inputs(self):
        side, tokens = self.parts["transformer"]["sample_size"], self.given["tokens"]
        words = self.parts["text"]["vocab_size"]
        ids = np.random.default_rng(0).integers(1, words, (1, tokens)).astype(np.int32)
        size = np.full((1, 2), 8.0 * side, np.float32)
        sizes = {"size": size, "aspect": np.ones((1, 1), np.float32)}
        return normal(1, side, side, 4), {
            "ids": ids,
            "mask": np.ones((1, tokens), np.int32),
            **sizes,
        }

    def functions(self):
        module, denoise = (
            self.modules["transformer"],
            sampling.denoiser(self.modules["transformer"]),
        )
        table = solvers.lcm(schedule.linear(), self.steps)
        table = jax.tree.map(lambda c: np.asarray(c, np.float32), table)
        tokens = self.given["tokens"]
        text = closed_forms.t5(self.modules["text"], tokens)
        once, read = closed_forms.pixart(module, tokens), closed_forms.pixart_text(module, tokens)

        def encode(params, cond):
            text = {"params": params["text"]}
            encoded = self.modules["text"].apply(text, cond["ids"], cond["mask"])
            sizes = {k: cond[k] for k in ("size", "aspect")}
            return {"text": encoded, "text_mask": cond["mask"], **sizes}

        def evaluate(params, x, cond):
            return denoise(params["transformer"], x, jnp.full((1,), 999), encode(params, cond))

        def sample(params, x, cond):
            cond, key = encode(params, cond), jax.random.key(0)
            return sampling.sample(denoise, params["transformer"], x, cond, table, key)

        loop = text + self.steps * once - (self.steps - 1) * read
        return {
            "one evaluation": (evaluate, text + once),
            f"{self.steps}-step sampling": (sample, loop),
        }

    def theirs(self, model, wrap=lambda f: f):
        x, cond = self.inputs()
        x, cond = self.to_torch(x), {k: self.to_torch(v) for k, v in cond.items()}
        t5, sizes = model["text"], {k: cond[k] for k in ("size", "aspect")}
        encode = wrap(lambda ids, mask: t5(ids, mask).last_hidden_state)
        network = wrap(PixArt.network(self, model["transformer"]))

        def read():
            text = encode(cond["ids"].long(), cond["mask"].long())
            return {"text": text, "text_mask": cond["mask"], **sizes}

        def sample():
            given = read()
            return lcm_loop(lambda z, t: network(z, t, given), x, self.steps)

        return {
            "one evaluation": no_grad(lambda: network(x, 999, read())),
            f"{self.steps}-step sampling": no_grad(sample),
        }
