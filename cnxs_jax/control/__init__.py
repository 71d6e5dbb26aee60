"""Controllers: adapters that wrap a denoiser and are a denoiser again.

`attach` puts an adapter (or several) on a base network. The result reads `cond["hint"]` and
`cond["control_scale"]` beside what the base reads; its parameters are
`{"base": ..., "control": ...}`.
"""

from cnxs_jax.errors import ConfigError


def attach(base_module, base_params, adapter_module, adapter_params, compat="official"):
    """`(module, {"base": base_params, "control": adapter_params})`: the controlled denoiser.

    Args:
        base_module, base_params: the network to control; both stay as they are.
        adapter_module, adapter_params: a controller, or lists of equally many of both. Of several,
            `cond["hint"]` and `cond["control_scale"]` are tuples, and the parameters lie under
            "adapters_0", "adapters_1", ...
        compat: whose computation to follow; the adapter's class lists what it knows.

    Raises:
        ConfigError: the adapter does not fit the base, or `compat` is not known to it.
    """
    several = isinstance(adapter_module, list | tuple)
    adapters = tuple(adapter_module) if several else (adapter_module,)
    if not adapters or several and len(adapters) != len(adapter_params):
        raise ConfigError(
            f"{len(adapters)} adapters with parameters for {len(adapter_params)}",
            "control.attach",
            "give one parameter tree an adapter",
        )
    kinds = sorted({type(a).__name__ for a in adapters})
    if len(kinds) > 1:
        raise ConfigError(f"cannot attach {' and '.join(kinds)} together", "control.attach")
    if not hasattr(adapters[0], "wrap"):
        fix = "give the directory or file of a controller"
        raise ConfigError(f"{kinds[0]} is no controller", "control.attach", fix)
    module = type(adapters[0]).wrap(base_module, adapters if several else adapters[0], compat)
    if several:
        adapter_params = {f"adapters_{i}": p for i, p in enumerate(adapter_params)}
    return module, {"base": base_params, "control": adapter_params}
