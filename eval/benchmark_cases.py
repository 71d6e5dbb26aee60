"""What `python -m eval.benchmark` times: the networks, and the train steps of `train.step`.

The benchmark is a command above both `eval` and `train`; nothing of them imports it.
"""

import jax
import jax.numpy as jnp
import optax

from cnxs_jax.diffusion import sampling, schedule
from eval import closed_forms
from eval.benchmark_case import normal, to_torch, torch_device
from eval.benchmark_networks import T5, ClipText, PixArt, PixArt256, UNet, VAEDecode
from train import objectives, step


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
        loss = objectives.denoise(sampling.denoiser(self.module), schedule.linear())
        once = closed_forms.pixart(self.module, self.given["tokens"])
        return loss, closed_forms.train_step(once)

    def _step(self):
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
        init, run, _ = self._step()
        state = jax.eval_shape(init, params)
        return {self.name: run.lower(state, self.frozen(params), *self.inputs())}

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
