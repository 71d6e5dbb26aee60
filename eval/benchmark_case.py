"""One network on both sides, from one config: what each case of the benchmark fills in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import families, rules


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
