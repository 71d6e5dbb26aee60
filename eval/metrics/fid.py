"""Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)). It is FID only on the features of the 2015
Inception network (`eval.metrics.inception`); on others it is named after them (`name`). The
estimate is biased upwards, by an amount that falls with the sample size (Chong & Forsyth 2020):
compare only figures of the same number of images, and claim FID from 10 000 on.
"""

import dataclasses
import os

import numpy as np

from cnxs_jax.errors import DataError, first_line
from eval.metrics import inputs
from eval.metrics.mmd import Estimate

INCEPTION = "inception2015"


def name(network):
    """What the distance on a network's features is called: "fid" or `fd_NETWORK`."""
    return "fid" if network == INCEPTION else f"fd_{network}"


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean `[d]` and covariance `[d, d]` (divided by n - 1) of features, float64."""

    mean: np.ndarray
    cov: np.ndarray


def moments(features):
    """The `Moments` of features `[n >= 2, d]`; DataError otherwise."""
    x, _ = inputs.features(features, features, "frechet")
    return Moments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def load_moments(path):
    """Reference statistics: an `.npz` with `mu` and `sigma`, as pytorch-fid and clean-fid write.

    Raises:
        DataError: no such file, a damaged one, or other or ill-shaped content.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("a single array")
        with file:
            mean, cov = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise nearly anything
        what = f"no reference statistics: {first_line(error)[:80]}"
        raise DataError(what, str(path), "an .npz with mu and sigma") from None
    if mean.ndim != 1 or cov.shape != mean.shape * 2:
        raise DataError(f"mu {mean.shape} and sigma {cov.shape} do not belong together", str(path))
    return Moments(mean, cov)


def save_moments(path, moments):
    """Writes `Moments` in the layout that `load_moments` reads."""
    with open(os.fspath(path), "wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.cov)


def frechet(a, b):
    """Frechet distance (squared 2-Wasserstein distance) of two `Moments`.

    Raises:
        DataError: different widths or non-finite moments.
    """
    return _solve(a, b)[0]


def distance(x, other):
    """`frechet_distance`, or with the `Moments` of a reference whose pictures are not here.

    Then the interval is over `x` alone, and `num_y` is 0: the file does not say it.
    """
    if not isinstance(other, Moments):
        return frechet_distance(x, other)
    x, _ = inputs.features(x, x, "frechet")
    a = moments(x)
    value, root, _, (left, middle, _) = _solve(a, other)
    variance = _influence(x, a, other, root, left, middle).var(ddof=1) / len(x)
    return Estimate.of(value, np.sqrt(variance), x, ())


def frechet_distance(x, y):
    """Frechet distance of features `x [n, d]` and `y [m, d]`, as an `Estimate`.

    The standard error is the delta method's, through the transport map between the Gaussians
    (Rippl, Munk & Sturm 2016, theorem 2.1). It says how far the figure scatters when the images
    are drawn again; it does not contain the bias of a small sample.

    Raises:
        DataError: fewer than two rows on a side, different widths or non-finite features.
    """
    x, y = inputs.features(x, y, "frechet")
    a, b = moments(x), moments(y)
    value, root_a, root_b, (left, middle, right) = _solve(a, b)
    variance = _influence(x, a, b, root_a, left, middle).var(ddof=1) / len(x)
    variance += _influence(y, b, a, root_b, right.T, middle).var(ddof=1) / len(y)
    return Estimate.of(value, np.sqrt(variance), x, y)


def _solve(a, b):
    """(distance, root of a, root of b, SVD of their product).

    With S = R R^T, the eigenvalues of S_a S_b are the squared singular values of R_a^T R_b, so no
    square root is taken of a product that rounding made indefinite or non-symmetric.
    """
    if a.mean.shape != b.mean.shape:
        raise DataError(f"widths differ: {a.mean.shape}, {b.mean.shape}", "frechet")
    if not all(np.isfinite(v).all() for v in (a.mean, a.cov, b.mean, b.cov)):
        raise DataError("got non-finite moments", "frechet", "look at the images that made them")
    root_a, root_b = _root(a.cov), _root(b.cov)
    svd = np.linalg.svd(root_a.T @ root_b, full_matrices=False)
    trace = (root_a**2).sum() + (root_b**2).sum() - 2 * svd[1].sum()
    return float(((a.mean - b.mean) ** 2).sum() + trace), root_a, root_b, svd


def _root(cov):
    """R `[d, rank]` with orthogonal columns and R R^T = cov.

    Directions without variance (fewer images than features) are left out: their eigenvalues are
    rounding errors, whose square roots would not be small.
    """
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, keep] * np.sqrt(values[keep])


def _influence(x, own, other, root, singular, middle):
    """First-order change of the distance by each row of `x`, up to a constant, `[n]`."""
    centred = x - own.mean
    whitened = centred @ (root / (root**2).sum(0))
    transported = (whitened @ singular) ** 2 @ middle
    return 2 * centred @ (own.mean - other.mean) + (centred**2).sum(1) - transported
