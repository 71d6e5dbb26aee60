"""Train steps for `python -m eval.benchmark`: `train.step` beside the same step in PyTorch.

AdamW, an average of what is trained, and the norm of the gradient on both sides. Both take
the same timesteps and noise in the first two steps, whose losses and norms are compared; the second
one's also say what the first step changed.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnxs_jax.diffusion import sampling, schedule
from cnxs_jax.diffusion.expert_tree import Times
from eval import closed_forms, closed_forms_control
from eval.benchmark_case import normal, to_torch, torch_device
from eval.benchmark_control import BETAS, ControlNetUNet, ControlNetXSUNet
from eval.benchmark_networks import PixArt, up_taps
from train import objectives, step

LEARNING_RATE, EMA_DECAY = 1e-5, 0.95


class TrainStep:
    """Mixed into a network's case: its train step instead of its evaluation.

    Weights are float32; with `dtype` "bfloat16" only the computation is in half precision (ours the
    module's, PyTorch's under autocast).
    """

    name = "denoise train step"
    calls = 2
    times = 1000  # timesteps, or distillation's grid, from which one is drawn

    def __init__(self, size="full", steps=4, dtype="float32"):
        super().__init__(size, steps, dtype)
        self.compared = (self.name,)

    def inputs(self):
        x, cond = super().inputs()
        return {"x": 0.5 * x, "cond": cond}, jax.random.key(0)

    def cast(self, params):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def abstract(self):
        return self.shapes

    def torch_ready(self, model):
        return model.to(device=torch_device())

    def to_torch(self, x):
        return to_torch(x)

    # Ours

    def schedule(self):
        """The noise schedule."""
        raise NotImplementedError

    def objective(self):
        """Our objective."""
        raise NotImplementedError

    def closed(self):
        """FLOPs of the step by hand."""
        raise NotImplementedError

    def trained(self, params):
        """What has gradients."""
        return params

    def frozen(self, params):
        """What the objective reads and does not train."""
        return {}

    def functions(self):
        return {self.name: (None, self.closed())}

    def _step(self):
        tx = optax.adamw(LEARNING_RATE)
        init = lambda params: step.init_state(self.trained(params), tx)  # noqa: E731
        return init, jax.jit(step.make_step(self.objective(), tx, EMA_DECAY), donate_argnums=0)

    def lower(self, params=None, only=None):
        params = self.abstract() if params is None else params
        init, run = self._step()
        state = jax.eval_shape(init, params)
        return {self.name: run.lower(state, self.frozen(params), *self.inputs())}

    def runners(self, compiled, params):
        state, frozen = [self._step()[0](params)], self.frozen(params)
        inputs = jax.tree.map(jnp.asarray, self.inputs())

        def run():
            state[0], metrics = compiled[self.name](state[0], frozen, *inputs)
            return jax.block_until_ready([metrics["loss"], metrics["grad_norm"]])

        return {self.name: run}

    # PyTorch's

    def draws(self):
        """[(time [1], noise NCHW)] of the first two steps, as ours draws them."""
        batch, key = self.inputs()
        found = []
        for n in range(self.calls):
            keys = jax.random.fold_in(key, n)
            t, noise = objectives.draw(keys, jnp.asarray(batch["x"]), Times(self.times).draw)
            found.append((self.to_torch(t).long(), self.to_torch(noise)))
        return found

    def student(self, model):
        """A copy that shares what is frozen."""
        self.freeze(model)
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        return copy.deepcopy(model, frozen).train()

    def theirs(self, model, wrap=lambda f: f):
        import torch

        student = self.student(model)
        averaged = copy.deepcopy(student, {id(p): p for p in untrained(student)})
        trained, means = (
            [p for p in m.parameters() if p.requires_grad] for m in (student, averaged)
        )
        averaged.requires_grad_(False)
        optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)
        batch, draws = self.inputs()[0], self.draws()
        x, cond = self.to_torch(batch["x"]), jax.tree.map(self.to_torch, batch["cond"])
        loss = self.torch_loss(wrap(self.network(student)), model, averaged, wrap)
        half, done = self.dtype != jnp.float32, [0]

        def run():
            t, noise = draws[min(done[0], len(draws) - 1)]
            done[0] += 1
            with torch.autocast(torch_device(), torch.bfloat16, enabled=half):
                value = loss(x, t, noise, cond)
            value.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            optimiser.step()
            with torch.no_grad():
                for mean, new in zip(means, trained, strict=True):
                    mean.lerp_(new, 1 - EMA_DECAY)
            optimiser.zero_grad(set_to_none=True)  # held, they would not count as the step's memory
            return [value.detach(), norm]

        return {self.name: run}

    def torch_abar(self):
        """The schedule's alpha-bar [1000]."""
        import torch

        abar = torch.tensor(np.asarray(self.schedule().alphas_cumprod, np.float32))
        return abar.to(torch_device())

    def torch_loss(self, network, base, averaged, wrap):
        """`f(x, t, noise, cond) -> scalar`."""
        import torch

        abar = self.torch_abar()

        def loss(x, t, noise, cond):
            a = abar[t].reshape(-1, 1, 1, 1)
            out = network(a.sqrt() * x + (1 - a).sqrt() * noise, t, cond)
            return torch.nn.functional.mse_loss(out[:, : x.shape[1]].float(), noise)

        return loss


def untrained(model):
    """The parameters without gradients."""
    return (p for p in model.parameters() if not p.requires_grad)


class DenoiseStep(TrainStep, PixArt):
    """Epsilon prediction with PixArt; 4 of 28 blocks."""

    full = PixArt.full | {"num_layers": 4}
    reduced = "4 of 28 blocks"

    def freeze(self, model):
        """Everything is trained."""

    def schedule(self):
        return schedule.linear()

    def objective(self):
        return objectives.denoise(sampling.denoiser(self.module), self.schedule())

    def closed(self):
        once = self.batch * closed_forms.pixart(self.module, self.given["tokens"])
        return closed_forms.train_step(once)


class LCDStep(DenoiseStep):
    """A step of PixArt-delta's distillation: student, guided teacher, averaged student."""

    name = "LCD train step"
    times = 50

    def inputs(self):
        batch, key = super().inputs()
        cond = batch["cond"]
        null = {"text": normal(*cond["text"].shape, seed=1), "text_mask": cond["text_mask"]}
        return {"x": batch["x"], "cond": cond | {"null": null}}, key

    def objective(self):
        denoise = sampling.denoiser(self.module)
        return objectives.consistency(denoise, denoise, self.schedule())

    def closed(self):
        once = self.batch * closed_forms.pixart(self.module, self.given["tokens"])
        return closed_forms.lcd_step(once)

    def frozen(self, params):
        return {"teacher": params}

    def torch_loss(self, network, base, averaged, wrap):
        import torch

        abar = self.torch_abar()
        teacher, target = wrap(self.network(base)), wrap(self.network(averaged))

        def parts(out, x, t):
            a = abar[t].reshape(-1, 1, 1, 1)
            return (x - (1 - a).sqrt() * out) / a.sqrt(), out

        def consistent(network, x, t, cond):
            x0, _ = parts(network(x, t, cond).float().chunk(2, 1)[0], x, t)
            scaled = (10.0 * t.float()).reshape(-1, 1, 1, 1) ** 2
            return 0.25 / (scaled + 0.25) * x + (scaled / (scaled + 0.25)).sqrt() * x0

        def guided(x, t, cond):
            both = {k: torch.cat([cond[k], cond["null"][k]]) for k in cond["null"]}
            out = teacher(torch.cat([x, x]), torch.cat([t, t]), both).float()
            c, u = out.chunk(2, 1)[0].chunk(2)
            return c + 4.5 * (c - u)

        def loss(x, index, noise, cond):
            t = index * 20 + 19
            s, a = (t - 20).clamp(min=0), abar[t].reshape(-1, 1, 1, 1)
            x_t = a.sqrt() * x + (1 - a).sqrt() * noise
            with torch.no_grad():
                x0, eps = parts(guided(x_t, t, cond), x_t, t)
                a = abar[s].reshape(-1, 1, 1, 1)
                x_s = a.sqrt() * x0 + (1 - a).sqrt() * eps
                wanted = consistent(target, x_s, s, cond)
            error = consistent(network, x_t, t, cond) - wanted
            return ((error**2 + 1e-6).sqrt() - 1e-3).mean()

        return loss


class LCDFullStep(LCDStep):
    """The same with all 28 blocks and four pictures, for a GPU."""

    full, batch, reduced = PixArt.full, 4, None


class ControlStep(TrainStep):
    """Epsilon prediction with a controller, the base frozen on both sides."""

    def schedule(self):
        return schedule.scaled_linear(*BETAS, 1000)

    def objective(self):
        run = sampling.denoiser(self.module)
        return objectives.denoise(run, self.schedule(), objectives.controlled)

    def closed(self):
        return closed_forms_control.train_step(*self.sizes(), up_taps())

    def trained(self, params):
        return params["control"]

    def frozen(self, params):
        return {"base": params["base"]}


class ControlNetXSStep(ControlStep, ControlNetXSUNet):
    """ControlNet-XS on Stable Diffusion 1.5, 512 px."""

    name = "ControlNet-XS train step"


class ControlNetStep(ControlStep, ControlNetUNet):
    """The original ControlNet on Stable Diffusion 1.5, 512 px."""

    name = "ControlNet train step"


class ControlNetXSStep256(ControlNetXSStep):
    """The same at 256 px, where 512 px do not fit."""

    full = ControlNetXSUNet.full | {"sample_size": 32}
    reduced = "256 of 512 px"


class ControlNetShallowStep(ControlNetStep):
    """The same with half of the layers, where both sides' moments do not fit."""

    full = ControlNetUNet.full | {"layers_per_block": 1}
    reduced = "1 of 2 layers a level"
