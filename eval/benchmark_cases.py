"""What `python -m eval.benchmark` times: both sides of each network, from one config.

A case builds our module from diffusers' or transformers' config, the PyTorch model from the same,
and gives ours the other's random weights. `lower` needs no weights, so that every full-size program
can be built and counted on any machine.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import families, rules
from cnxs_jax.convert import unet as unets
from cnxs_jax.diffusion import sampling, schedule, solvers
from eval import closed_forms


class Case:
    """One network at one size.

    Attributes:
        class_name: diffusers' or transformers' name of the network.
        full, tiny: its config at the published size and for tests, with the sizes of the inputs.
        reduced: what of the published size is left out, or None.
        compared: the program whose outputs are compared, or None.
    """

    class_name = None
    full, tiny = {}, {}
    reduced = None
    compared = "one evaluation"

    def __init__(self, size="full", steps=4):
        self.config = dict(self.full if size == "full" else self.tiny)
        self.given = {k: self.config.pop(k) for k in ("tokens", "side") if k in self.config}
        self.steps = steps
        family = families.family_of({"_class_name": self.class_name}, "eval.benchmark")
        self.module, self.shapes = families.build(family, self.config, "eval.benchmark")
        self.table = family.table

    def torch_model(self):
        """The PyTorch model with random weights, none of them zero."""
        import torch

        torch.manual_seed(0)
        model = self.torch_class().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.01)
        return model

    def torch_class(self):
        import diffusers

        return getattr(diffusers, self.class_name)(**self.config)

    def params(self, model):
        """The PyTorch model's weights as our tree."""
        tensors = {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}
        return jax.tree.map(jnp.asarray, rules.to_params(tensors, self.shapes, self.table))

    def inputs(self):
        """Arguments of our functions after the parameters, numpy; both sides read these."""
        raise NotImplementedError

    def functions(self):
        """{program: (f(params, *inputs), closed form)}."""
        raise NotImplementedError

    def theirs(self, model):
        """{program: function without arguments -> numpy result}."""
        raise NotImplementedError

    def lower(self, params=None):
        """{program: `jax.stages.Lowered`}; on abstract parameters unless given."""
        params = self.shapes if params is None else params
        return {
            k: jax.jit(f).lower(params, *self.inputs()) for k, (f, _) in self.functions().items()
        }

    def runners(self, compiled, params):
        """{program: function without arguments} of the compiled programs; they wait for it."""
        inputs = jax.tree.map(jnp.asarray, self.inputs())
        return {
            k: functools.partial(_wait, program, params, *inputs) for k, program in compiled.items()
        }


def _wait(program, *arguments):
    return jax.block_until_ready(program(*arguments))


def normal(*shape, seed=0):
    """Standard normal float32."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def to_torch(x):
    """A tensor on the device that PyTorch computes on; NHWC pictures become NCHW."""
    import torch

    x = torch.tensor(np.asarray(x))
    return (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x).to(torch_device())


def torch_device():
    """ "cuda" where both sides can have it."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def to_numpy(tensor):
    """A tensor's numbers; NCHW pictures become NHWC."""
    tensor = tensor.detach()
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).cpu().numpy()


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
            "text": normal(1, tokens, self.config["caption_channels"]),
            "text_mask": np.ones((1, tokens), np.int32),
        }
        return normal(1, side, side, 4), cond

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
        """diffusers' call: `f(x, t, text, mask)`."""
        import torch

        def call(x, t, text, mask):
            return model(
                x,
                encoder_hidden_states=text,
                timestep=torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x)),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=mask,
            ).sample

        return call

    def theirs(self, model):
        import torch
        from diffusers import LCMScheduler

        x, cond = self.inputs()
        x, text, mask = to_torch(x), to_torch(cond["text"]), to_torch(cond["text_mask"])
        network = self.network(model)
        scheduler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

        @torch.no_grad()
        def evaluate():
            return to_numpy(network(x, 999, text, mask))

        @torch.no_grad()
        def sample():
            scheduler.set_timesteps(self.steps)
            z = x
            for t in scheduler.timesteps:
                out = network(z, t, text, mask).chunk(2, 1)[0]
                z, _ = scheduler.step(out, t, z, return_dict=False)
            return to_numpy(z)

        return {"one evaluation": evaluate, f"{self.steps}-step sampling": sample}


class PixArt256(PixArt):
    """The same at 256 px."""

    full = PixArt.full | {"sample_size": 32}


class DenoiseStep(PixArt):
    """A train step: epsilon prediction, AdamW, EMA; batch 1, 4 of 28 blocks."""

    full = PixArt.full | {"num_layers": 4}
    reduced = "4 of 28 blocks"
    compared = None  # both draw their own noise
    name = "denoise train step"

    def inputs(self):
        x, cond = super().inputs()
        return {"x": 0.5 * x, "cond": cond}, jax.random.key(0)

    def objective(self):
        """Our objective and the closed form."""
        from train import objectives  # the benchmark stands above training, too

        loss = objectives.denoise(sampling.denoiser(self.module), schedule.linear())
        once = closed_forms.pixart(self.module, self.given["tokens"])
        return loss, closed_forms.train_step(once)

    def _step(self):
        import optax

        from train import step

        objective, closed = self.objective()
        tx = optax.adamw(1e-5)
        init = lambda params: step.init_state(params, tx)  # noqa: E731
        return init, jax.jit(step.make_step(objective, tx, 0.95), donate_argnums=0), closed

    def functions(self):
        return {self.name: (None, self._step()[2])}

    def frozen(self, params):
        """What the objective reads and does not train."""
        return {}

    def lower(self, params=None):
        params = self.shapes if params is None else params
        init, step, _ = self._step()
        state = jax.eval_shape(init, params)
        return {self.name: step.lower(state, self.frozen(params), *self.inputs())}

    def runners(self, compiled, params):
        state, frozen = [self._step()[0](params)], self.frozen(params)
        inputs = jax.tree.map(jnp.asarray, self.inputs())

        def run():
            state[0], metrics = compiled[self.name](state[0], frozen, *inputs)
            return jax.block_until_ready(metrics["loss"])

        return {self.name: run}

    def theirs(self, model):
        import copy

        import torch

        student = copy.deepcopy(model).train()
        averaged = copy.deepcopy(model).requires_grad_(False)
        optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5)
        batch, _ = self.inputs()
        cond = batch["cond"]
        x, text, mask = (to_torch(v) for v in (batch["x"], cond["text"], cond["text_mask"]))
        loss = self.torch_loss(model.requires_grad_(False), averaged)

        def run():
            optimiser.zero_grad(set_to_none=True)
            value = loss(self.network(student), x, text, mask)
            value.backward()
            optimiser.step()
            with torch.no_grad():
                pairs = zip(averaged.parameters(), student.parameters(), strict=True)
                for mean, new in pairs:
                    mean.lerp_(new, 0.05)
            return value.item()

        return {self.name: run}

    def torch_loss(self, base, averaged):
        """`f(network, x, text, mask) -> scalar`."""
        import torch

        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(torch_device())

        def loss(network, x, text, mask):
            noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
            a = abar[t].reshape(-1, 1, 1, 1)
            out = network(a.sqrt() * x + (1 - a).sqrt() * noise, t, text, mask)
            return torch.nn.functional.mse_loss(out.chunk(2, 1)[0], noise)

        return loss


class LCDStep(DenoiseStep):
    """A step of PixArt-delta's distillation: student, guided teacher, averaged student."""

    name = "LCD train step"

    def inputs(self):
        batch, key = super().inputs()
        cond = batch["cond"]
        null = {"text": normal(*cond["text"].shape, seed=1), "text_mask": cond["text_mask"]}
        return {"x": batch["x"], "cond": cond | {"null": null}}, key

    def objective(self):
        from train import objectives

        denoise = sampling.denoiser(self.module)
        loss = objectives.consistency(denoise, denoise, schedule.linear())
        once = closed_forms.pixart(self.module, self.given["tokens"])
        return loss, closed_forms.lcd_step(once)

    def frozen(self, params):
        return {"teacher": params}

    def torch_loss(self, base, averaged):
        import torch

        batch, _ = self.inputs()
        null = to_torch(batch["cond"]["null"]["text"])
        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(torch_device())
        teacher, target = self.network(base), self.network(averaged)

        def parts(out, x, t):
            a = abar[t].reshape(-1, 1, 1, 1)
            return (x - (1 - a).sqrt() * out) / a.sqrt(), out

        def consistent(network, x, t, text, mask):
            x0, _ = parts(network(x, t, text, mask).chunk(2, 1)[0], x, t)
            scaled = (10.0 * t.float()).reshape(-1, 1, 1, 1) ** 2
            return 0.25 / (scaled + 0.25) * x + (scaled / (scaled + 0.25)).sqrt() * x0

        def loss(network, x, text, mask):
            t = torch.randint(0, 50, (len(x),), device=x.device) * 20 + 19
            s, a = (t - 20).clamp(min=0), abar[t].reshape(-1, 1, 1, 1)
            x_t = a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)
            with torch.no_grad():
                both = torch.cat([x_t, x_t]), torch.cat([t, t])
                out = teacher(*both, torch.cat([text, null]), torch.cat([mask, mask]))
                c, u = out.chunk(2, 1)[0].chunk(2)
                x0, eps = parts(c + 4.5 * (c - u), x_t, t)
                a = abar[s].reshape(-1, 1, 1, 1)
                x_s = a.sqrt() * x0 + (1 - a).sqrt() * eps
                wanted = consistent(target, x_s, s, text, mask)
            error = consistent(network, x_t, t, text, mask) - wanted
            return ((error**2 + 1e-6).sqrt() - 1e-3).mean()

        return loss


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

    def theirs(self, model):
        import torch

        ids, mask = (to_torch(v).long() for v in self.inputs())

        @torch.no_grad()
        def run():
            return to_numpy(model(ids, mask).last_hidden_state)

        return {"one evaluation": run}


class ClipText(Case):
    """CLIP ViT-L/14's text encoder, as SD 1.5 has it."""

    class_name = "CLIPTextModel"
    full = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "tokens": 77}  # fmt: skip
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "tokens": 77,
            "num_attention_heads": 4, "vocab_size": 99, "eos_token_id": 98}  # fmt: skip

    def inputs(self):
        words = self.config.get("vocab_size", 49408)
        ids = np.random.default_rng(0).integers(1, words - 1, (1, self.given["tokens"]))
        ids[:, -1] = words - 1  # the end of the text
        return (ids.astype(np.int32),)

    def functions(self):
        f = lambda params, ids: self.module.apply({"params": params}, ids)["last"]  # noqa: E731
        return {"one evaluation": (f, closed_forms.clip_text(self.module, self.given["tokens"]))}

    def torch_class(self):
        import transformers

        config = {"eos_token_id": 49407} | self.config
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))

    def theirs(self, model):
        import torch

        (ids,) = (to_torch(v).long() for v in self.inputs())

        @torch.no_grad()
        def run():
            return to_numpy(model(ids).last_hidden_state)

        return {"one evaluation": run}


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

    def theirs(self, model):
        import torch

        (z,) = (to_torch(v) for v in self.inputs())

        @torch.no_grad()
        def run():
            return to_numpy(model.decode(z).sample)

        return {"one evaluation": run}


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

    def theirs(self, model):
        import torch

        x, cond = self.inputs()
        x, text = to_torch(x), to_torch(cond["text"])

        @torch.no_grad()
        def run():
            return to_numpy(model(x, 999, encoder_hidden_states=text).sample)

        return {"one evaluation": run}


def up_taps():
    """On a CPU our convolution after a doubling is four convolutions of 2x2 (`models.conv`)."""
    cpu = jax.default_backend() == "cpu"
    return closed_forms.PHASE_TAPS if cpu else closed_forms.UP_TAPS


CASES = {
    "pixart_xl_256": PixArt256,
    "pixart_xl_512": PixArt,
    "t5_xxl": T5,
    "clip_text_l": ClipText,
    "vae_decode_512": VAEDecode,
    "unet_sd15_512": UNet,
    "denoise_step_xl_512": DenoiseStep,
    "lcd_step_xl_512": LCDStep,
}
