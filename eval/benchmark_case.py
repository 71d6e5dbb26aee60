"""One network on both sides, from one config: what each case of the benchmark fills in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import families, rules

WHERE = "eval.benchmark"


class Case:
    """One network at one size.

    Attributes:
        class_name: diffusers' or transformers' name of the network.
        full, tiny: its config at the published size and for tests, with the sizes of the inputs.
        reduced: what of the published size is left out, or None.
        batch: pictures, of the cases that say so.
        compared: the programs whose outputs are compared.
        calls: of each of them that are compared; a second step shows what the first one changed.

    Args:
        size: "full" or "tiny".
        steps: of the sampling loop.
        dtype: "float32", or "bfloat16": weights and computation on both sides.
    """

    class_name = None
    full, tiny = {}, {}
    reduced = None
    batch = 1
    compared = ("one evaluation",)
    calls = 1

    def __init__(self, size="full", steps=4, dtype="float32"):
        self.full_size = size == "full"
        self.config = dict(self.full if size == "full" else self.tiny)
        self.given = {k: self.config.pop(k) for k in ("tokens", "side") if k in self.config}
        self.steps, self.dtype = steps, jnp.dtype(dtype)
        self.build()

    def build(self):
        """Sets `module`, `shapes` of its parameters, and `table` of its file layout."""
        self.module, self.shapes, self.table = self.network_of(self.class_name, self.config)

    def network_of(self, class_name, config):
        """(module, shapes of its parameters, table) of a config."""
        family = families.family_of({"_class_name": class_name}, WHERE)
        return *families.build(family, config, WHERE, self.dtype), family.table

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

    def torch_ready(self, model):
        """The model on its device and in its dtype."""
        model = model if self.dtype == jnp.float32 else model.to(self.torch_dtype())
        return model.to(torch_device())

    def torch_dtype(self):
        import torch

        return getattr(torch, self.dtype.name)

    def params(self, model):
        """The PyTorch model's weights as our tree."""
        tensors = {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}
        return self.cast(rules.to_params(tensors, self.shapes, self.table))

    def cast(self, params):
        """Parameters on the device in the dtype of the weights."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)

    def inputs(self):
        """Arguments of our functions after the parameters, numpy; both sides read these."""
        raise NotImplementedError

    def functions(self):
        """{program: (f(params, *inputs), closed form)}."""
        raise NotImplementedError

    def theirs(self, model, wrap=lambda f: f):
        """{program: function without arguments -> tensor, or a list of them}.

        Args:
            wrap: of the function of tensors that is timed; `torch.compile` gives the compiled side.
        """
        raise NotImplementedError

    def to_torch(self, x):
        """`to_torch` in the weights' dtype."""
        x = to_torch(x)
        return x.to(self.torch_dtype()) if x.is_floating_point() else x

    def abstract(self):
        """Shapes of the parameters in the dtype of the weights."""
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, self.dtype), self.shapes)

    def lower(self, params=None, only=None):
        """{program: `jax.stages.Lowered`}; on abstract parameters unless given.

        Args:
            only: the name of one program.
        """
        params = self.abstract() if params is None else params
        return {
            k: jax.jit(f).lower(params, *self.inputs())
            for k, (f, _) in self.functions().items()
            if only in (None, k)
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


def to_numpy(value):
    """Arrays or tensors as float32 numpy, NCHW pictures as NHWC; a list becomes one vector."""
    if isinstance(value, list | tuple):
        return np.array([float(v) for v in value], np.float32)
    if isinstance(value, jax.Array):
        return np.asarray(jax.device_get(value), np.float32)
    value = value.detach().float()
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).cpu().numpy()
