"""The networks of `python -m eval.benchmark`: evaluations, sampling, encoding, decoding.

A case builds our module from diffusers' or transformers' config, the PyTorch model from the same,
and gives ours the other's random weights. `lower` needs no weights, so that every full-size program
can be built and counted on any machine.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import backend
from cnxs_jax.convert import unet as unets
from cnxs_jax.diffusion import sampling, schedule, solvers
from eval import closed_forms
from eval.benchmark_case import Case, normal

PIXART_TINY = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 32,
    "sample_size": 16,
    "use_additional_conditions": False,
    "tokens": 20,
}


class PixArt(Case):
    """PixArt-XL/2: one evaluation, and N steps of LCM without guidance."""

    class_name = "PixArtTransformer2DModel"
    full = {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False,
            "tokens": 120}  # fmt: skip
    tiny = PIXART_TINY

    def inputs(self):
        side, tokens = self.config["sample_size"], self.given["tokens"]
        cond = {
            "text": normal(self.batch, tokens, self.config["caption_channels"]),
            "text_mask": np.ones((self.batch, tokens), np.int32),
        }
        return normal(self.batch, side, side, 4), cond

    def functions(self):
        denoise = sampling.denoiser(self.module)
        # Rounded to float32 here; as a constant of the program it would be traced in float64.
        table = solvers.lcm(schedule.linear(), self.steps)
        table = jax.tree.map(lambda c: np.asarray(c, np.float32), table)
        once = closed_forms.pixart(self.module, self.given["tokens"])
        text = closed_forms.pixart_text(self.module, self.given["tokens"])  # the loop reads it once

        def evaluate(params, x, cond):
            return denoise(params, x, jnp.full((1,), 999), cond)

        def sample(params, x, cond):
            return sampling.sample(denoise, params, x, cond, table, jax.random.key(0))

        loop = self.steps * once - (self.steps - 1) * text
        return {"one evaluation": (evaluate, once), f"{self.steps}-step sampling": (sample, loop)}

    def network(self, model):
        """diffusers' call: `f(x, t, cond)`."""
        import torch

        def call(x, t, cond):
            return model(
                x,
                encoder_hidden_states=cond["text"],
                timestep=torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x)),
                added_cond_kwargs={
                    "resolution": cond.get("size"),
                    "aspect_ratio": cond.get("aspect"),
                },
                encoder_attention_mask=cond["text_mask"],
            ).sample

        return call

    def theirs(self, model, wrap=lambda f: f):
        x, cond = self.inputs()
        x, cond = self.to_torch(x), {k: self.to_torch(v) for k, v in cond.items()}
        network = wrap(self.network(model))
        return {
            "one evaluation": no_grad(lambda: network(x, 999, cond)),
            f"{self.steps}-step sampling": no_grad(
                lambda: lcm_loop(lambda z, t: network(z, t, cond), x, self.steps)
            ),
        }


def lcm_loop(network, x, steps):
    """diffusers' LCM on PixArt's schedule; `network(x, t)` has the variance, too."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = network(x, t).chunk(2, 1)[0]
        x, _ = scheduler.step(out, t, x, return_dict=False)
    return x


def no_grad(f):
    """`f` without the graph of its gradients."""
    import torch

    return torch.no_grad()(f)


class PixArt256(PixArt):
    """The same at 256 px."""

    full = PixArt.full | {"sample_size": 32}


class T5(Case):
    """T5-XXL's encoder, as PixArt has it; its layers are alike, so two of them are timed."""

    class_name = "T5EncoderModel"
    full = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 2, "num_heads": 64,
            "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tokens": 120}  # fmt: skip
    tiny = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "feed_forward_proj": "gated-gelu", "vocab_size": 101, "tokens": 16}  # fmt: skip
    reduced = "2 of 24 layers"

    def inputs(self):
        tokens, words = self.given["tokens"], self.config["vocab_size"]
        ids = np.random.default_rng(0).integers(1, words, (1, tokens)).astype(np.int32)
        return ids, np.ones((1, tokens), np.int32)

    def functions(self):
        f = lambda params, ids, mask: self.module.apply({"params": params}, ids, mask)  # noqa: E731
        return {"one evaluation": (f, closed_forms.t5(self.module, self.given["tokens"]))}

    def torch_class(self):
        import transformers

        return transformers.T5EncoderModel(transformers.T5Config(**self.config))

    def theirs(self, model, wrap=lambda f: f):
        ids, mask = (self.to_torch(v).long() for v in self.inputs())
        encode = wrap(lambda ids, mask: model(ids, mask).last_hidden_state)
        return {"one evaluation": no_grad(lambda: encode(ids, mask))}


class ClipText(Case):
    """CLIP ViT-L/14's text encoder, as SD 1.5 has it."""

    class_name = "CLIPTextModel"
    full = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "tokens": 77}  # fmt: skip
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "tokens": 77,
            "num_attention_heads": 4, "vocab_size": 99, "eos_token_id": 98}  # fmt: skip
    ours, output = "last", "last_hidden_state"  # what is computed and compared

    def inputs(self):
        words = self.config.get("vocab_size", 49408)
        ids = np.random.default_rng(0).integers(1, words - 1, (1, self.given["tokens"]))
        ids[:, -1] = words - 1  # the end of the text
        return (ids.astype(np.int32),)

    def functions(self):
        def encode(params, ids):
            return self.module.apply({"params": params}, ids)[self.ours]

        projected = self.class_name == "CLIPTextModelWithProjection"
        closed = closed_forms.clip_text(self.module, self.given["tokens"], projected)
        return {"one evaluation": (encode, closed)}

    def torch_class(self):
        import transformers

        config = transformers.CLIPTextConfig(**{"eos_token_id": 49407} | self.config)
        return getattr(transformers, self.class_name)(config)

    def theirs(self, model, wrap=lambda f: f):
        (ids,) = (self.to_torch(v).long() for v in self.inputs())
        encode = wrap(lambda ids: getattr(model(ids), self.output))
        return {"one evaluation": no_grad(lambda: encode(ids))}


class ClipTextH(ClipText):
    """OpenCLIP ViT-H/14's text encoder, as SD 2.1 has it: 23 of its layers."""

    full = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu", "tokens": 77}  # fmt: skip


class ClipTextBigG(ClipText):
    """OpenCLIP ViT-bigG/14's text encoder with its projection, as SDXL has it."""

    class_name = "CLIPTextModelWithProjection"
    full = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
            "tokens": 77}  # fmt: skip
    tiny = ClipText.tiny | {"projection_dim": 16}
    ours, output = "pooled", "text_embeds"


class VAEDecode(Case):
    """Stable Diffusion's decoder, 64 x 64 latents to 512 px."""

    class_name = "AutoencoderKL"
    full = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "side": 64}
    tiny = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "side": 8}

    def inputs(self):
        side = self.given["side"]
        return (normal(1, side, side, 4),)

    def functions(self):
        def decode(params, z):
            return self.module.apply({"params": params}, z, method="decode")

        closed = closed_forms.vae_decoder(self.module, self.given["side"], up_taps())
        return {"one evaluation": (decode, closed)}

    def torch_class(self):
        import diffusers

        levels = len(self.config["block_out_channels"])
        return diffusers.AutoencoderKL(
            **self.config,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )

    def theirs(self, model, wrap=lambda f: f):
        (z,) = (self.to_torch(v) for v in self.inputs())
        decode = wrap(lambda z: model.decode(z).sample)
        return {"one evaluation": no_grad(lambda: decode(z))}


class UNet(Case):
    """Stable Diffusion 1.5's UNet at 512 px."""

    class_name = "UNet2DConditionModel"
    full = unets.PUBLISHED["sd15"] | {"sample_size": 64, "tokens": 77}
    tiny = {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4,
            "sample_size": 16, "tokens": 7}  # fmt: skip

    def inputs(self):
        side = self.config["sample_size"]
        text = normal(1, self.given["tokens"], self.config["cross_attention_dim"])
        return normal(1, side, side, 4), {"text": text}

    def functions(self):
        def evaluate(params, x, cond):
            return self.module.apply({"params": params}, x, jnp.full((1,), 999), cond)

        side, tokens = self.config["sample_size"], self.given["tokens"]
        return {
            "one evaluation": (evaluate, closed_forms.unet(self.module, tokens, side, up_taps()))
        }

    def theirs(self, model, wrap=lambda f: f):
        x, cond = self.inputs()
        x, text = self.to_torch(x), self.to_torch(cond["text"])
        network = wrap(lambda x, text: model(x, 999, encoder_hidden_states=text).sample)
        return {"one evaluation": no_grad(lambda: network(x, text))}


def up_taps():
    """On a CPU our convolution after a doubling is four convolutions of 2x2 (`models.conv`)."""
    cpu = backend.current() == "cpu"
    return closed_forms.PHASE_TAPS if cpu else closed_forms.UP_TAPS
