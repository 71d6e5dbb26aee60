"""A network with a known answer, and the loop written out in float64 numpy.

For data `N(MEAN, STD^2)` the best x0 and the probability-flow ODE have closed forms, for
variance-preserving and for noise-level scaled `x` alike.
"""

import numpy as np

MEAN, STD = 0.3, 0.5


def signal_noise(table_row_sigma, edm):
    """`(alpha, sigma)` at a noise level."""
    alpha = 1.0 if edm else 1.0 / np.sqrt(1.0 + table_row_sigma**2)
    return alpha, alpha * table_row_sigma


def best_x0(x, level, edm=False):
    """E[x0 | x] at a noise level."""
    alpha, sigma = signal_noise(level, edm)
    return MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def flow(x, level, edm=False):
    """Where the probability-flow ODE takes `x` from a noise level to the data."""
    alpha, sigma = signal_noise(level, edm)
    return MEAN + STD * (x - alpha * MEAN) / np.sqrt(alpha**2 * STD**2 + sigma**2)


def replay(table, network, x, noise=None):
    """The rows of `table` one by one; `network(x, row)` returns the raw output."""
    x = np.asarray(x, np.float64) * table.init_scale
    past = []
    for i in range(len(table)):
        x0 = table.p[i] * x + table.q[i] * network(x, i)
        past = [table.u[i] * x + table.v[i] * x0, *past]
        x = table.a[i] * x + sum(b * h for b, h in zip(table.b[i], past, strict=False))
        if noise is not None:
            x = x + table.d[i] * noise[i]
    return x


def gaussian_error(table, edm=False):
    """Largest error of the table against the exact flow, over starts from -2 to 2."""
    start = np.linspace(-2, 2, 9)
    exact = flow(start * table.init_scale, table.sigma[0], edm)

    def network(x, i):
        x0 = best_x0(x, table.sigma[i], edm)
        if edm:
            return x0
        alpha, sigma = signal_noise(table.sigma[i], edm)
        return (x - alpha * x0) / sigma

    return np.abs(replay(table, network, start) - exact).max()
