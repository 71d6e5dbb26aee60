"""Networks that lie on the host and are on the device only while they run.

The modes carry diffusers' names ("model CPU offload", "sequential CPU offload"):

- `model`: a network is moved to the device for its stage, and given up before the next one's.
- `sequential`: besides, T5's blocks go through the device one after another, straight from the
  mapped weight file: two of them at a time and hardly any host memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree
from cnxs_jax.convert import rules
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.style_words import with_words
from cnxs_jax.models.t5 import RMSNorm, T5Block, T5Encoder, position_buckets
from cnxs_jax.pipelines.load import check_dtype, open_model, read_model

MODES = ("model", "sequential")
BLOCKS = "encoder/block/"


def check(mode, mesh=None, quantize=None):
    """Raises ConfigError for an unknown mode, or one that does not go with the rest."""
    if mode is None:
        return
    if mode not in MODES:
        hint = did_you_mean(mode, MODES)
        raise ConfigError(f"unknown offload {mode!r}.{hint}", "offload", f"one of {MODES}")
    if mesh is not None:
        fix = "give one of them: on a mesh the parameters are split over the devices"
        raise ConfigError("offload and mesh exclude each other", "offload", fix)
    if mode == "sequential" and quantize is not None:
        fix = 'use offload="model" with quantize, or offload="sequential" alone'
        raise ConfigError("blocks are streamed as the file has them", "quantize", fix)


def load(path, mode, dtype=None, quantize=None, part=None):
    """`(module, parameters on the host)` of a component directory; T5 stays in its file if
    `mode` is "sequential". `part`: of a directory that holds two networks fused in one."""
    if mode == "sequential":
        module, target, tensors, table, where = open_model(path, part, dtype=check_dtype(dtype))
        if isinstance(module, T5Encoder):
            return module, StreamedT5(module, tensors, target, table, where, dtype)
    return read_model(path, part, dtype=dtype, quantize=quantize)


def run(program, module, params, *args, **static):
    """`program(module, params, *args)`, the parameters on the device while it runs and no longer.

    The result is waited for: otherwise the next network would be moved in beside this one.
    """
    if isinstance(params, StreamedT5):
        return params.encode(*args)
    placed = jax.device_put(params)
    return jax.block_until_ready(program(module, placed, *args, **static))


class StreamedT5:
    """A T5 encoder whose weights stay in their memory-mapped file."""

    def __init__(self, module, tensors, target, table, where, dtype=None):
        self.module, self.dtype = module, np.dtype(dtype or np.float32)
        plan, _, _ = rules.fit(tensors, target, table, where)
        self.blocks, self.rest = [[] for _ in range(module.num_layers)], {}
        for path, index, _, array in plan:
            if index is None:
                self.rest[path] = array
            else:
                self.blocks[index].append((path.removeprefix(BLOCKS), array))

    def block(self, index):
        """The parameters of one block, on the device."""
        own = {path: self._read(path, array) for path, array in self.blocks[index]}
        return jax.device_put(tree.unflatten(own))

    def _read(self, path, array):
        return np.array(rules.from_torch(path, array), self.dtype, order="C")

    def encode(self, ids, mask, words=None):
        """Text [B,L,d_model] float32 of ids [B,L] and mask [B,L]: what the whole encoder gives.

        `words` [B,n,d_model] as `T5Encoder` takes them.

        Raises ConfigError for ids that the table lacks.
        """
        module, ids = self.module, np.asarray(ids)
        if ids.max(initial=0) >= module.vocab_size:
            what = f"id {ids.max()} is not below vocab_size {module.vocab_size}"
            raise ConfigError(what, "t5 input")
        embedding = self.rest["shared/embedding"]
        known = np.maximum(ids, 0)
        x = jnp.asarray(embedding[known].astype(self.dtype), jnp.float32)
        x = x if words is None else with_words(x, ids, words)
        bias = self._position_bias(ids.shape[1])
        following = self.block(0)
        for index in range(module.num_layers):
            own = following
            x = run_block(module, own, x, bias, mask)
            following = self.block(index + 1) if index + 1 < module.num_layers else None
            x.block_until_ready()  # or all blocks would be on the device before the first is used
        scale = self._read("scale", self.rest["encoder/final_layer_norm/scale"])
        norm = RMSNorm(module.layer_norm_epsilon)
        return norm.apply({"params": {"scale": jnp.asarray(scale)}}, x)

    def _position_bias(self, length):
        table = self._read("", self.rest["encoder/relative_attention_bias/embedding"])
        distance = self.module.relative_attention_max_distance
        buckets = position_buckets(length, len(table), distance)
        return jnp.asarray(table[buckets].transpose(2, 0, 1)[None], jnp.float32)


@functools.partial(jax.jit, static_argnames="module")
def run_block(module, params, x_BxLxD, bias_1xHxLxL, mask_BxL):
    """One block of the encoder `module`; all of them share this program."""
    block = T5Block(*module.block_fields)
    return block.apply({"params": params}, x_BxLxD, bias_1xHxLxL, mask_BxL)[0]


def refuse_saving(components):
    """Raises ConfigError where a component's weights are not at hand."""
    for name, (_, params) in components.items():
        if isinstance(params, StreamedT5):
            fix = "load the pipeline without offload to save it"
            raise ConfigError("its weights are streamed from a file", name, fix)
