"""The demo page: `python -m cnxs_jax.demo` (extra `demo`)."""
