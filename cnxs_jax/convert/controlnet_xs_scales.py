"""The factors of the connections that an official ControlNet-XS file may carry."""

import numpy as np

from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert.rules import side_tensors, to_float
from cnxs_jax.errors import CheckpointError


def connection_scales(tensors, module, where="weights"):
    """float32 [2N+1] for `cond["connection_scale"]` from an official file, or None if all are 1.

    The file's list holds only the connections that the type has; type A has none in the encoder.

    Raises CheckpointError for a list of another length, or with NaN or infinity.
    """
    scales = side_tensors(tensors, layouts.official(module)).get(layouts.SCALES)
    if scales is None or (scales == 1).all():
        return None
    n = len(module.up_stages)
    encoder = 0 if module.control_type == "A" else n
    if scales.shape != (encoder + 1 + n,) or not np.isfinite(scales).all():
        what = f"{layouts.SCALES} {scales.tolist()}, expected {encoder + 1 + n} finite numbers"
        raise CheckpointError(what, where, "check that the config belongs to these weights")
    return np.concatenate([np.ones(n - encoder, np.float32), scales])


def folded(tensors, module, where="weights"):
    """An official file's tensors with `scale_list` in the connections' weights, then all 1.

    The same network: each factor multiplies what one zero convolution gives to the base.

    Raises CheckpointError as `connection_scales`.
    """
    scales = connection_scales(tensors, module, where)
    if scales is None:
        return tensors
    convs, stages = layouts.OFFICIAL_CONVS, range(len(module.up_stages))
    names = [convs["down_out"].format(n) for n in stages]
    names += [convs["mid_out"], *(convs["up_out"].format(n) for n in stages)]
    scaled = {
        key: scale * to_float(tensors[key])
        for name, scale in zip(names, scales, strict=True)
        for key in (f"{name}.weight", f"{name}.bias")
        if key in tensors and scale != 1
    }
    return {**tensors, **scaled, layouts.SCALES: np.ones_like(tensors[layouts.SCALES])}
