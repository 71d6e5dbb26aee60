"""Attention on every platform behind one function.

`attention(q, k, v, mask_BxS=..., bias=..., impl=...)`. The forms:

- `xla`: one einsum, softmax in float32. The reference, and best for short sequences.
- `blocked`: a loop over (batch, head) and blocks of queries. On a CPU the logits of one block stay
  in the cache, which is several times faster than `xla` at 1024 tokens and above.
- `cudnn`: fused attention on a GPU (bfloat16 or float16, head_dim a multiple of 8).
- `splash`: the Pallas kernel on a TPU, for long sequences. Head dims are padded to 128.

`impl=None` chooses from the backend, the dtype and the shapes when the program is traced. Under the
mesh of `jax.set_mesh` the forms that XLA cannot split run on each device's own rows and heads.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import backend, sharding
from cnxs_jax.errors import ConfigError, did_you_mean

BLOCK = 1024  # queries a block in the blocked form: a fifth faster than 512 at 1024 tokens
LOGITS, MIN_BLOCK = 2**21, 128  # fewer queries for many keys: 512 at 4096, an eighth faster
LANES = 128  # of a TPU; splash works on multiples


def attention(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, *, mask_BxS=None, bias=None, scale=None, impl=None):
    """softmax(q k^T * scale + bias) v.

    Args:
        q_BxLxHxD, k_BxSxHxD, v_BxSxHxD: queries, keys, values.
        mask_BxS: bool or 0/1, which keys are real. A row without any real key gives the mean of
            the values and never NaN.
        bias: added to the scaled logits, broadcastable to [B, H, L, S].
        scale: factor of the logits, 1/sqrt(D) unless given.
        impl: None (chosen), "xla", "blocked", "cudnn", "splash" or "splash_interpret".

    Returns:
        [B, L, H, D] in the dtype of `q`.
    """
    scale = 1.0 / math.sqrt(q_BxLxHxD.shape[-1]) if scale is None else scale
    if impl is None:
        _, L, _, D = q_BxLxHxD.shape
        lengths, extra = (L, k_BxSxHxD.shape[1]), (mask_BxS is not None, bias is not None)
        impl = choose(backend.current(), capability(), q_BxLxHxD.dtype, lengths, D, *extra)
    if impl not in FORMS:
        raise ConfigError(
            f"unknown attention form {impl!r}.{did_you_mean(impl, FORMS)}",
            "attention impl",
            f"use one of {', '.join(FORMS)} or None",
        )
    form = _on_each_device(FORMS[impl]) if impl in LOOPS else FORMS[impl]
    return form(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, mask_BxS, bias, scale)


def choose(platform, capability, dtype, lengths, head_dim, masked=False, biased=False):
    """The name of the form for one platform, dtype and shape.

    Args:
        platform: "cpu", "gpu", "tpu" or `backend.ACCELERATOR`.
        capability: of an NVIDIA GPU, (major, minor); None where there is none.
        dtype: of the queries.
        lengths: (L, S), of queries and keys.
        head_dim: D.
        masked, biased: whether there is a mask, a bias.

    cuDNN wants Ampere (8.0) or newer, half precision, head dims up to 128 that are multiples of 8
    and, with a bias (a mask becomes one), even lengths for its gradient.
    """
    queries, keys = lengths
    if platform in ("cpu", backend.ACCELERATOR):
        return "blocked" if queries * keys >= 512 * 512 else "xla"
    if platform == "tpu":
        return "splash" if not biased and min(lengths) >= 1024 else "xla"
    half = dtype in (jnp.bfloat16, jnp.float16)
    card = platform == "gpu" and capability is not None and capability >= (8, 0)
    fits = head_dim % 8 == 0 and head_dim <= 128
    odd = (masked or biased) and (queries % 2 or keys % 2)
    return "cudnn" if card and half and fits and not odd else "xla"


def capability():
    """(major, minor) of this process's NVIDIA GPUs, the least of them, or None."""
    found = [str(getattr(d, "compute_capability", "")) for d in jax.local_devices()]
    parts = [text.split(".") for text in found]
    if not all(len(p) == 2 and all(n.isdigit() for n in p) for p in parts):
        return None  # no GPU, or one of another maker ("gfx90a")
    return min(tuple(map(int, p)) for p in parts)


def _on_each_device(form):
    """`form` on the rows and heads that a device holds, where there is a mesh.

    XLA cannot split a Pallas kernel (it refuses to compile one on several devices) nor a loop over
    batch and heads (it would gather them). Rows go over `data` and `fsdp`, heads over `tensor`; an
    axis that does not divide them computes the same on each of its devices.
    """

    def run(q, k, v, mask, bias, scale):
        mesh = jax.sharding.get_abstract_mesh()
        free = sharding.free_axes(mesh)
        if not free:  # one device, or inside of a `shard_map` already
            return form(q, k, v, mask, bias, scale)
        rows = sharding.dividing(mesh, free.intersection(sharding.BATCH), q.shape[0])
        heads = sharding.dividing(mesh, free.intersection({"tensor"}), q.shape[2])

        def spec(x, head_axis):
            """Rows first, heads at `head_axis`; an axis of length 1 is broadcast and whole."""
            axes = [None] * x.ndim
            axes[0] = rows if x.shape[0] > 1 else None
            if head_axis is not None and x.shape[head_axis] > 1:
                axes[head_axis] = heads
            return jax.P(*axes)

        given = {"q": (q, 2), "k": (k, 2), "v": (v, 2), "mask": (mask, None), "bias": (bias, 1)}
        given = {name: pair for name, pair in given.items() if pair[0] is not None}

        def local(arrays):
            parts = (arrays.get(name) for name in ("q", "k", "v", "mask", "bias"))
            return form(*parts, scale)

        return jax.shard_map(
            local,
            in_specs=({name: spec(*pair) for name, pair in given.items()},),
            out_specs=spec(q, 2),
            axis_names=free,
            check_vma=False,
        )({name: x for name, (x, _) in given.items()})

    return run


def _additive(mask, bias, batch):
    """Mask and bias as one float32 array [B|1, H|1, L|1, S], or None."""
    if mask is not None:
        masked = jnp.where(mask[:, None, None, :] > 0, 0.0, jnp.finfo(jnp.float32).min)
        bias = masked if bias is None else jnp.maximum(bias + masked, jnp.finfo(jnp.float32).min)
    return bias


def _softmax(logits, dtype):
    logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).astype(dtype)


def _xla(q, k, v, mask, bias, scale):
    logits = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32) * scale
    bias = _additive(mask, bias, q.shape[0])
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return jnp.einsum("bhls,bshd->blhd", _softmax(logits, q.dtype), v)


def _blocked(q, k, v, mask, bias, scale):
    """Loops over (batch, head) and blocks of queries; keys are not split, logits are [block, S]."""
    (B, L, H, D), S, dtype = q.shape, k.shape[1], q.dtype
    q, k, v = (x.astype(jnp.result_type(q, k, v)) for x in (q, k, v))
    block = min(BLOCK, L, max(LOGITS // S, MIN_BLOCK))
    pad = -L % block
    num = (L + pad) // block
    bias = _additive(mask, bias, B)
    # The scale goes into q: one pass over [L, D] and none over the logits.
    q = jnp.pad((q * scale).astype(q.dtype), ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_BHxNxMxD = q.transpose(0, 2, 1, 3).reshape(B * H, num, block, D)
    k_BHxSxD = k.transpose(0, 2, 1, 3).reshape(B * H, S, D)
    v_BHxSxD = v.transpose(0, 2, 1, 3).reshape(B * H, S, D)
    bias = None if bias is None else _by_block(bias, (B, H, S), num, pad)

    out = _heads(q_BHxNxMxD, k_BHxSxD, v_BHxSxD, bias)
    return out.reshape(B, H, L + pad, D)[:, :, :L].transpose(0, 2, 1, 3).astype(dtype)


@jax.custom_vjp
def _heads(q_BHxNxMxD, k_BHxSxD, v_BHxSxD, bias):
    """Blocks of queries one after another, of one head after another: [B*H, N, M, D].

    With a gradient of its own (arXiv 2307.08691, section 2.3), in reverse mode alone: what the
    loops would keep for it is every weight [B*H, L, S], half a gigabyte a layer for 8 heads of 4096
    tokens. Kept are the output and two numbers a query; the weights are computed once more.
    """
    return _heads_forward(q_BHxNxMxD, k_BHxSxD, v_BHxSxD, bias)[0]


def _logits(q_MxD, k_SxD, bias_QxS):
    logits = jnp.einsum("md,sd->ms", q_MxD, k_SxD, preferred_element_type=jnp.float32)
    return logits if bias_QxS is None else logits + bias_QxS


def _heads_forward(q_BHxNxMxD, k_BHxSxD, v_BHxSxD, bias):
    def one_head(args):
        q_NxMxD, k_SxD, v_SxD, bias_NxQxS = args

        def one_block(args):
            q_MxD, bias_QxS = args
            logits = _logits(q_MxD, k_SxD, bias_QxS)
            max_Mx1 = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - max_Mx1)
            sum_Mx1 = weights.sum(-1, keepdims=True)
            out = weights.astype(v_SxD.dtype) @ v_SxD  # normalise [M, D], not [M, S]
            # Both kept, not max + log(sum): a row without a real key would lose the latter.
            return out / sum_Mx1.astype(out.dtype), max_Mx1, sum_Mx1

        if len(q_NxMxD) > 1:
            return jax.lax.map(one_block, (q_NxMxD, bias_NxQxS))
        done = one_block(jax.tree.map(lambda a: a[0], (q_NxMxD, bias_NxQxS)))
        return jax.tree.map(lambda a: a[None], done)

    inputs = q_BHxNxMxD, k_BHxSxD, v_BHxSxD, bias
    out, *softmax = jax.lax.map(one_head, inputs)
    return out, (*inputs, out, *softmax)


def _heads_backward(kept, g_BHxNxMxD):
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one_head(args):
        (q_NxMxD, k_SxD, v_SxD, bias_NxQxS, *outputs), g_NxMxD = args
        dtype = k_SxD.dtype
        # A row of g_logits sums to zero, so that what all keys or all values share drops out; left
        # in, it would be what the rounding errors are relative to.
        own_k_SxD = k_SxD - k_SxD.mean(0, keepdims=True)
        mean_v_1xD = v_SxD.mean(0, keepdims=True)
        own_v_SxD = v_SxD - mean_v_1xD

        def one_block(sums_DxS, args):
            q_MxD, bias_QxS, out_MxD, max_Mx1, sum_Mx1, g_MxD = args
            weights = jnp.exp(_logits(q_MxD, k_SxD, bias_QxS) - max_Mx1)
            g_MxD = g_MxD / sum_Mx1.astype(dtype)  # and not the weights, [M, S]
            own_out_MxD = out_MxD - mean_v_1xD
            along_Mx1 = jnp.sum(g_MxD.astype(jnp.float32) * own_out_MxD, -1, keepdims=True)
            g_logits = weights * (product("md,sd->ms", g_MxD, own_v_SxD) - along_Mx1)
            # The narrow factor is transposed, not [M, S]: several times faster on a CPU.
            g_k_DxS = product("dm,ms->ds", q_MxD.T, g_logits.astype(dtype))
            g_v_DxS = product("dm,ms->ds", g_MxD.T, weights.astype(dtype))
            g_bias = None
            if bias_QxS is not None:
                g_bias = g_logits.sum(0, keepdims=True) if len(bias_QxS) == 1 else g_logits
            sums_DxS = sums_DxS[0] + g_k_DxS, sums_DxS[1] + g_v_DxS
            return sums_DxS, (g_logits.astype(dtype) @ own_k_SxD, g_bias)

        zeros = jnp.zeros(k_SxD.T.shape, jnp.float32)
        blocks = q_NxMxD, bias_NxQxS, *outputs, g_NxMxD
        (g_k_DxS, g_v_DxS), (g_q, g_bias) = jax.lax.scan(one_block, (zeros, zeros), blocks)
        return g_q, g_k_DxS.astype(dtype), g_v_DxS.astype(dtype), g_bias

    g_q, g_k, g_v, g_bias = jax.lax.map(one_head, (kept, g_BHxNxMxD))
    # Transposed back out here: inside, XLA would fold it into the product and transpose [M, S].
    return g_q, g_k.swapaxes(1, 2), g_v.swapaxes(1, 2), g_bias


_heads.defvjp(_heads_forward, _heads_backward)


def _by_block(bias, sizes, num, pad):
    """An additive bias [B|1, H|1, L|1, S] as [B*H, num, Q, S] with Q the block's queries or 1."""
    B, H, S = sizes
    queries = bias.shape[2]
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (B, H, queries, S))
    if queries == 1:
        return jnp.broadcast_to(bias.reshape(B * H, 1, 1, S), (B * H, num, 1, S))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
    return bias.reshape(B * H, num, -1, S)


def _cudnn(q, k, v, mask, bias, scale):
    mask = None if mask is None else (mask > 0)[:, None, None, :]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], 1, q.shape[1], k.shape[1]))
    if bias is not None:
        shape = (*bias.shape[:2], q.shape[1], k.shape[1])
        bias = jnp.broadcast_to(bias, shape).astype(q.dtype)
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, implementation="cudnn"
    )


@functools.cache
def _splash_kernel(heads, queries, keys, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    full = masks.MultiHeadMask([masks.FullMask((queries, keys)) for _ in range(heads)])
    # The masks become constants of the kernel: made outside of any trace that calls us, and kept
    # on the host, where they belong to no mesh.
    with jax.ensure_compile_time_eval():
        made = kernel.make_splash_mha_single_device(mask=full, interpret=interpret)
        return jax.tree.map(np.asarray, made)


def _splash(q, k, v, mask, bias, scale, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )

    if bias is not None:
        raise ConfigError("splash attention takes no bias", "attention impl", 'use impl="xla"')
    B, L, H, D = q.shape
    S = k.shape[1]

    def pad(x):
        length = -x.shape[1] % LANES
        x = jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, -D % LANES)))
        return x.transpose(0, 2, 1, 3)

    q, k, v = pad(q * scale), pad(k), pad(v)
    real = jnp.ones((B, S), jnp.int32) if mask is None else (mask > 0).astype(jnp.int32)
    q_segment = jnp.ones((B, q.shape[2]), jnp.int32)
    kv_segment = jnp.pad(real, ((0, 0), (0, k.shape[2] - S)))
    run = _splash_kernel(H, q.shape[2], k.shape[2], interpret)
    out = jax.vmap(lambda q, k, v, qs, ks: run(q, k, v, kernel.SegmentIds(qs, ks)))(
        q, k, v, q_segment, kv_segment
    )
    return out[:, :, :L, :D].transpose(0, 2, 1, 3).astype(q.dtype)


FORMS = {
    "xla": _xla,
    "blocked": _blocked,
    "cudnn": _cudnn,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
}
LOOPS = ("blocked", "splash", "splash_interpret")  # forms that XLA does not split over devices


def sincos_2d(dim, height, width, base_size, interpolation_scale=1.0):
    """PixArt's position table, float32 [height*width, dim].

    Both axes are stretched to the range 0 .. base_size / interpolation_scale whatever their length;
    the first half of the channels encodes the column, the second the row, each sines first
    (PixArt-alpha `get_2d_sincos_pos_embed`). float64 on the host.
    """

    def axis(n):
        return np.arange(n, dtype=np.float64) / (n / base_size) / interpolation_scale

    def encode(position_N):
        omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
        angles = position_N[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns, rows = np.meshgrid(axis(width), axis(height))
    table = np.concatenate([encode(columns.reshape(-1)), encode(rows.reshape(-1))], axis=1)
    return table.astype(np.float32)
