"""Controlled UNets for `python -m eval.benchmark`: one evaluation, and N steps of DDIM.

Stable Diffusion 1.5 at 512 px, with its published ControlNet-XS (53 million parameters) or with the
original ControlNet. diffusers' side is its fused `UNetControlNetXSModel`, and its `ControlNetModel`
whose residuals go into the UNet.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import control
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.convert import rules
from cnxs_jax.diffusion import sampling, schedule, solvers
from eval import closed_forms_control
from eval.benchmark_case import Case, normal
from eval.benchmark_networks import UNet, no_grad, up_taps

BETAS = (0.00085, 0.012)
# diffusers knows ControlNet-XS only on UNets with two layers a level.
TINY = UNet.tiny | {"layers_per_block": 2}
WIDTHS = {"conditioning_embedding_out_channels": (4, 6, 6, 8)}


class Controlled(Case):
    """A base UNet with an adapter; parameters {"base": ..., "control": ...}.

    Attributes:
        adapter_class: diffusers' name of the adapter.
        full_adapter, tiny_adapter: its config.
        compat: the computation that diffusers' class has.
    """

    class_name = "UNet2DConditionModel"
    full, tiny = UNet.full, TINY
    adapter_class, full_adapter, tiny_adapter, compat = None, {}, {}, "official"

    def __init__(self, size="full", steps=4, dtype="float32"):
        self.adapter_config = dict(self.full_adapter if size == "full" else self.tiny_adapter)
        super().__init__(size, steps, dtype)
        self.compared = ("one evaluation", f"{steps}-step sampling")

    def build(self):
        base, shapes, self.base_table = self.network_of(self.class_name, self.config)
        found = self.network_of(self.adapter_class, self.adapter_config)
        self.adapter, own, self.adapter_table = found
        self.module, self.shapes = control.attach(base, shapes, self.adapter, own, self.compat)
        self.base = base

    def inputs(self):
        side, f = self.config["sample_size"], self.module.hint_factor
        hint = np.random.default_rng(1).uniform(size=(1, f * side, f * side, 3))
        text = normal(1, self.given["tokens"], self.config["cross_attention_dim"])
        return normal(1, side, side, 4), {"text": text, "hint": hint.astype(np.float32)}

    def sizes(self):
        """Arguments of the closed forms."""
        return self.base, self.adapter, self.given["tokens"], self.config["sample_size"]

    def functions(self):
        denoise = sampling.denoiser(self.module)
        table = solvers.ddim(schedule.scaled_linear(*BETAS, 1000), self.steps)
        table = jax.tree.map(lambda c: np.asarray(c, np.float32), table)
        once = closed_forms_control.controlled(*self.sizes(), up_taps())
        shared = closed_forms_control.prepared(*self.sizes())

        def evaluate(params, x, cond):
            return denoise(params, x, jnp.full((1,), 999), cond)

        def sample(params, x, cond):
            return sampling.sample(denoise, params, x, cond, table)

        loop = self.steps * once - (self.steps - 1) * shared
        return {"one evaluation": (evaluate, once), f"{self.steps}-step sampling": (sample, loop)}

    def network(self, model):
        """diffusers' call: `f(x, t, cond)`."""
        raise NotImplementedError

    def theirs(self, model, wrap=lambda f: f):
        x, cond = self.inputs()
        x, cond = self.to_torch(x), {k: self.to_torch(v) for k, v in cond.items()}
        network = wrap(self.network(model))
        return {
            "one evaluation": no_grad(lambda: network(x, 999, cond)),
            f"{self.steps}-step sampling": no_grad(
                lambda: ddim_loop(lambda z, t: network(z, t, cond), x, self.steps)
            ),
        }

    def parts(self, model):
        """{"base": tensors, "control": tensors} in the layouts of the two."""
        raise NotImplementedError

    def params(self, model):
        tensors = {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}
        parts, shapes = self.parts(tensors), self.shapes
        tables = {"base": self.base_table, "control": self.adapter_table}
        return self.cast({k: rules.to_params(parts[k], shapes[k], tables[k]) for k in tables})


class ControlNetXSUNet(Controlled):
    """ControlNet-XS; `from_unet` computes what is called "diffusers" here."""

    adapter_class, compat = "ControlNetXSAdapter", "diffusers"
    full_adapter = layouts.PUBLISHED["sd15_53m"] | {"max_norm_num_groups": 32}
    tiny_adapter = {
        "block_out_channels": (6, 24), "base_block_out_channels": (8, 16),
        "num_attention_heads": (2, 3), "cross_attention_dim": 12, "max_norm_num_groups": 4,
        "down_block_types": TINY["down_block_types"], "use_linear_projection": False,
        "sample_size": 16,
    } | WIDTHS  # fmt: skip

    def torch_class(self):
        import diffusers
        from diffusers.models.controlnets.controlnet_xs import (
            ControlNetXSAdapter,
            UNetControlNetXSModel,
        )

        base = diffusers.UNet2DConditionModel(**self.config)
        return UNetControlNetXSModel.from_unet(base, ControlNetXSAdapter(**self.adapter_config))

    def parts(self, tensors):
        split = fused.split(tensors)
        return {"base": split[fused.BASE], "control": split[fused.CONTROL]}

    def network(self, model):
        def call(x, t, cond):
            return model(x, t, cond["text"], controlnet_cond=cond["hint"]).sample

        return call

    def freeze(self, model):
        """Gradients for the adapter alone."""
        model.freeze_unet_params()


class ControlNetUNet(Controlled):
    """The original ControlNet: a copy of the base's encoder."""

    adapter_class = "ControlNetModel"

    def __init__(self, size="full", steps=4, dtype="float32"):
        shared = dict(self.full if size == "full" else self.tiny)
        for key in ("tokens", "side", "sample_size", "up_block_types"):
            shared.pop(key, None)
        self.full_adapter, self.tiny_adapter = shared, shared | WIDTHS
        super().__init__(size, steps, dtype)

    def torch_class(self):
        import diffusers
        import torch

        base = diffusers.UNet2DConditionModel(**self.config)
        copy = diffusers.ControlNetModel(**self.adapter_config)
        return torch.nn.ModuleDict({"base": base, "control": copy})

    def parts(self, tensors):
        return {
            part: {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(part)}
            for part in ("base", "control")
        }

    def network(self, model):
        def call(x, t, cond):
            text, hint = cond["text"], cond["hint"]
            down, mid = model["control"](x, t, text, hint, return_dict=False)
            return model["base"](
                x, t, text,
                down_block_additional_residuals=down, mid_block_additional_residual=mid,
            ).sample  # fmt: skip

        return call

    def freeze(self, model):
        """Gradients for the copy alone."""
        model["base"].requires_grad_(False)


def ddim_loop(network, x, steps):
    """diffusers' DDIM on Stable Diffusion's schedule."""
    from diffusers import DDIMScheduler

    start, end = BETAS
    scheduler = DDIMScheduler(
        beta_start=start, beta_end=end, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x
