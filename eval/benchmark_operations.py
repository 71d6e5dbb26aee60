"""Single operations of the published networks, on both sides: what holds a whole network back.

Each at the shapes of one evaluation of one picture, as the networks of this project call it and as
diffusers calls PyTorch. A gradient is that of the inputs alone, as behind a frozen base; that of
attention includes its forward pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnxs_jax.models.attention import attention
from cnxs_jax.models.conv import convolve
from cnxs_jax.models.layers import Dense
from eval.benchmark_case import Case, normal


class Operation(NamedTuple):
    """One operation: `ours(*inputs)`, `theirs(*tensors) -> function without arguments`, FLOPs."""

    ours: Any
    theirs: Any
    inputs: tuple
    closed_form: float


def convolution(side, channels, gradient=False):
    """3x3, stride 1, as many channels out as in, or its gradient towards the picture."""
    x = normal(1, side, side, channels)
    kernel = normal(3, 3, channels, channels, seed=1) / (9 * channels) ** 0.5

    def backward(g, kernel):
        return jax.vjp(lambda x: convolve(x, kernel), jnp.zeros_like(g))[1](g)[0]

    def forwards(x, w):
        from torch.nn.functional import conv2d

        return lambda: conv2d(x, w, padding=1)

    def backwards(g, w):
        import torch

        x = torch.zeros_like(g, requires_grad=True)
        y = torch.nn.functional.conv2d(x, w, padding=1)
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    pair = (backward, backwards) if gradient else (convolve, forwards)
    return Operation(*pair, (x, kernel), 2.0 * side**2 * 9 * channels**2)


def self_attention(tokens, heads, head_dim, gradient=False):
    """From and to [1, L, H D], which a network has; with `gradient` the three inputs' side by side.

    Seven products of this size: the two of attention, four of their gradients, and the logits that
    our blocked form computes a second time instead of keeping their softmax.
    """
    width = heads * head_dim
    inputs = tuple(normal(1, tokens, width, seed=n) for n in range(4 if gradient else 3))

    def forward(*qkv):
        split = (x.reshape(1, tokens, heads, head_dim) for x in qkv)
        return attention(*split).reshape(1, tokens, width)

    def both(g, *qkv):
        return jnp.concatenate(jax.vjp(forward, *qkv)[1](g), -1)

    def attend(q, k, v):
        from torch.nn.functional import scaled_dot_product_attention

        split = (x.view(1, tokens, heads, head_dim).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*split).transpose(1, 2).reshape(1, tokens, width)

    def differentiate(g, *qkv):
        import torch

        qkv = [x.requires_grad_() for x in qkv]
        return lambda: torch.cat(torch.autograd.grad(attend(*qkv), qkv, g), -1)

    product = 2.0 * tokens**2 * width
    if gradient:
        return Operation(both, differentiate, inputs, 7 * product)
    return Operation(forward, lambda *qkv: lambda: attend(*qkv), inputs, 2 * product)


def linear(tokens, given, made, gradient=False):
    """[1, L, C] to [1, L, O] with a bias, or its gradient towards the tokens."""
    kernel = normal(given, made, seed=1) / given**0.5

    def forward(x, kernel):
        params = {"kernel": kernel, "bias": jnp.zeros(made, x.dtype)}
        return Dense(made, dtype=x.dtype).apply({"params": params}, x)

    def backward(g, kernel):
        start = jnp.zeros((1, tokens, given), g.dtype)
        return jax.vjp(lambda x: forward(x, kernel), start)[1](g)[0]

    def theirs(x, kernel):
        import torch

        w, bias = kernel.T.contiguous(), x.new_zeros(made)
        if not gradient:
            return lambda: torch.nn.functional.linear(x, w, bias)
        start = x.new_zeros(1, tokens, given).requires_grad_()
        y = torch.nn.functional.linear(start, w, bias)
        return lambda: torch.autograd.grad(y, start, x, retain_graph=True)[0]

    inputs = (normal(1, tokens, made if gradient else given), kernel)
    return Operation(backward if gradient else forward, theirs, inputs, 2.0 * tokens * given * made)


class Operations(Case):
    """The operations of a network, each a program of its own with inputs of its own.

    Attributes:
        kinds: {name: (function above, its arguments)} at the published size.
        small: the same for tests.
    """

    kinds, small = {}, {}

    def build(self):
        self.shapes = {}
        kinds = self.kinds if self.full_size else self.small
        self.operations = {}
        for name, (make, *sizes) in kinds.items():
            self.operations[name] = make(*sizes)
            self.operations[f"{name}, gradient"] = make(*sizes, gradient=True)
        self.compared = tuple(self.operations)

    def torch_model(self):
        """There is no network."""

    def params(self, model):
        """There are no weights beside the inputs."""

    def torch_ready(self, model):
        """There is no network."""

    def functions(self):
        return {name: (one.ours, one.closed_form) for name, one in self.operations.items()}

    def lower(self, params=None, only=None):
        return {
            name: jax.jit(one.ours).lower(*self.arrays(one))
            for name, one in self.operations.items()
            if only in (None, name)
        }

    def runners(self, compiled, params):
        def waiting(program, arrays):
            return lambda: jax.block_until_ready(program(*arrays))

        return {
            name: waiting(program, self.arrays(self.operations[name]))
            for name, program in compiled.items()
        }

    def arrays(self, one):
        """Inputs of ours."""
        return tuple(jnp.asarray(x, self.dtype) for x in one.inputs)

    def theirs(self, model, wrap=lambda f: f):
        return {
            name: wrap(one.theirs(*map(self.tensor, one.inputs)))
            for name, one in self.operations.items()
        }

    def tensor(self, x):
        """Inputs of theirs: pictures in NCHW, kernels of convolutions in OIHW."""
        if x.ndim == 4 and len(x) != self.batch:  # a kernel [h,w,C,O]: O first, as of pictures
            x = x.transpose(3, 0, 1, 2)
        return self.to_torch(x)


class UNetOperations(Operations):
    """Stable Diffusion 1.5's UNet at 512 px, and the feed-forward of its text encoder."""

    kinds = {
        "convolution 64x64x320": (convolution, 64, 320),
        "convolution 32x32x640": (convolution, 32, 640),
        "convolution 16x16x1280": (convolution, 16, 1280),
        "convolution 8x8x1280": (convolution, 8, 1280),
        "attention 4096, 8 heads of 40": (self_attention, 4096, 8, 40),
        "attention 1024, 8 heads of 80": (self_attention, 1024, 8, 80),
        "linear 4096, 320 to 2560": (linear, 4096, 320, 2560),
        "linear 1024, 2560 to 640": (linear, 1024, 2560, 640),
        "linear 77, 768 to 3072": (linear, 77, 768, 3072),
    }
    small = {
        "convolution": (convolution, 8, 16),
        "attention": (self_attention, 600, 2, 8),
        "linear": (linear, 24, 16, 32),
    }


class DiTOperations(Operations):
    """PixArt-XL/2 at 512 px, and T5-XXL's feed-forward at 120 tokens."""

    kinds = {
        "attention 1024, 16 heads of 72": (self_attention, 1024, 16, 72),
        "linear 1024, 1152 to 1152": (linear, 1024, 1152, 1152),
        "linear 1024, 1152 to 4608": (linear, 1024, 1152, 4608),
        "linear 1024, 4608 to 1152": (linear, 1024, 4608, 1152),
        "linear 120, 4096 to 10240": (linear, 120, 4096, 10240),
    }
    small = UNetOperations.small
