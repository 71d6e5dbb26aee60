"""Expert denoisers: which expert runs at which noise level (eDiff-I, arXiv 2211.01324)."""

from dataclasses import replace

import numpy as np

from cnxs_jax.diffusion.grids import check_choice
from cnxs_jax.errors import ConfigError


def route(table, edges, by="sigma"):
    """`table` with its static expert column set from ascending `edges`.

    Expert 0 has the lowest noise, `[0, edges[0])`; expert i has `[edges[i-1], edges[i])`; the last
    has everything from the last edge on. A row belongs to the expert of its own evaluation.

    Args:
        edges: E - 1 rising numbers for E experts.
        by: "sigma" (noise level `sigma / alpha`) or "t" (training time). Levels do not carry over
            from one noise schedule to another; integer times leave no doubt at an edge.

    Raises:
        ConfigError: the edges do not rise.
    """
    check_choice(by, ("sigma", "t"), "by")
    edges = np.asarray(edges, np.float64)
    if edges.ndim != 1 or np.any(np.diff(edges) <= 0) or not np.all(np.isfinite(edges)):
        raise ConfigError(f"edges must be rising numbers, got {edges.tolist()}", "edges")
    column = np.searchsorted(edges, np.asarray(getattr(table, by)), side="right")
    return replace(table, expert=tuple(int(e) for e in column))
