"""Integrals of Lagrange polynomials over a step in the noise level, in closed form, float64."""

import numpy as np
from numpy.polynomial import polynomial


def lagrange_integrals(nodes, start, end, variable):
    """`int_start^end L_k d(rho)` for each node k.

    L_k is the Lagrange basis polynomial in rho or in log(rho) that is 1 at node k and 0 at the
    others. `end` may be 0: the integrand in log(rho) stays integrable there.

    Args:
        nodes: `[K]` distinct noise levels, newest first.
        start, end: noise levels.
        variable: "rho" or "log_rho".
    """
    forward = np.log if variable == "log_rho" else np.asarray
    # Centred at the newest node, so that the powers below do not cancel.
    points = forward(nodes) - forward(nodes[0])
    bases = [_basis(points, k) for k in range(len(points))]
    return np.array([_integral(basis, nodes[0], start, end, variable) for basis in bases])


def _basis(points, k):
    others = np.delete(points, k)
    return polynomial.polyfromroots(others) / np.prod(points[k] - others)


def _integral(coefficients, centre, start, end, variable):
    """Integral of the polynomial in (rho - centre) or log(rho / centre), from start to end."""
    if variable == "rho":
        primitive = polynomial.polyint(coefficients)
        ends = polynomial.polyval(np.array([start, end]) - centre, primitive)
        return ends[1] - ends[0]
    return _log_primitive(coefficients, centre, end) - _log_primitive(coefficients, centre, start)


def _log_primitive(coefficients, centre, rho):
    """`rho (P - P' + P'' - ...)` at `log(rho / centre)`, by parts with d(rho) = rho d(log rho)."""
    if rho == 0:
        return 0.0  # rho log(rho)^m -> 0
    total, term = coefficients.copy(), coefficients
    while len(term) > 1:
        term = -polynomial.polyder(term)
        total[: len(term)] += term
    return rho * polynomial.polyval(np.log(rho / centre), total)
