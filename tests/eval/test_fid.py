"""Frechet distance: closed forms, scipy's matrix root, rank deficiency, what its interval means."""

import numpy as np
import pytest
import scipy.linalg

from cnxs_jax.errors import DataError
from eval.metrics import fid


def gaussians(n, d, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def covariance(d, seed):
    root = np.random.default_rng(seed).normal(size=(d, 2 * d))
    return root @ root.T / d


def test_axis_aligned_gaussians_have_the_closed_form():
    """|mu|^2 + sum (s - t)^2 of the standard deviations."""
    s, t, shift = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.25]), np.array([1.0, -2.0, 0])
    a = fid.Moments(np.zeros(3), np.diag(s**2))
    b = fid.Moments(shift, np.diag(t**2))
    assert fid.frechet(a, b) == pytest.approx(5 + 4 + 0.0625, rel=1e-14)


def test_equals_scipys_matrix_root():
    a = fid.Moments(np.arange(24.0) / 9, covariance(24, 0))
    b = fid.Moments(np.zeros(24), covariance(24, 1))
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    expected = (a.mean**2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert fid.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_identical_and_shifted_sets():
    x = gaussians(400, 16)
    assert abs(fid.frechet_distance(x, x).value) < 1e-10
    shifted = fid.frechet_distance(x, x + 0.5)
    assert shifted.value == pytest.approx(16 * 0.25, rel=1e-10)
    assert fid.frechet_distance(x, 3 * x).value == pytest.approx(
        4 * ((x.mean(0) ** 2).sum() + x.var(0, ddof=1).sum()), rel=1e-10
    )


def test_fewer_images_than_features_costs_no_accuracy():
    """Rotated disjoint samples: each on its own axes, so the product of the roots is zero."""
    rotation = np.linalg.qr(gaussians(120, 120))[0]
    x, y = np.zeros((40, 120)), np.zeros((50, 120))
    x[:, :30], y[:, 30:60] = gaussians(40, 30, seed=1), gaussians(50, 30, seed=2)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected += x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    found = fid.frechet_distance(x @ rotation, y @ rotation).value
    assert found == pytest.approx(expected, rel=1e-12)
    x = gaussians(40, 120)
    assert abs(fid.frechet_distance(x, x).value) < 1e-10


def test_interval_is_that_of_the_jackknife():
    """The delta method against leaving out one row, where the rows are many."""
    x, y = gaussians(300, 3, seed=1) * [1, 2, 0.5], gaussians(250, 3, 0.4, seed=2)
    variance = 0.0
    for own, other in ((x, y), (y, x)):
        n = len(own)
        left = [fid.frechet_distance(np.delete(own, i, 0), other).value for i in range(n)]
        variance += (n - 1) ** 2 / n * np.var(left, ddof=1)
    assert fid.frechet_distance(x, y).stderr == pytest.approx(np.sqrt(variance), rel=0.02)


def test_against_stored_moments_only_the_sample_scatters():
    x, y = gaussians(300, 3, seed=1) * [1, 2, 0.5], gaussians(250, 3, 0.4, seed=2)
    both, stored = fid.distance(x, y), fid.distance(x, fid.moments(y))
    assert stored.value == pytest.approx(both.value, rel=1e-12)
    assert (stored.num_x, stored.num_y) == (300, 0)
    other = fid.distance(y, fid.moments(x))
    assert stored.stderr**2 + other.stderr**2 == pytest.approx(both.stderr**2, rel=1e-9)


def test_interval_covers_the_population_value():
    d, scale, shift = 4, 1.5, 0.7
    truth = d * (shift**2 + (scale - 1) ** 2)
    found = [
        fid.frechet_distance(
            gaussians(400, d, seed=s), scale * gaussians(400, d, seed=999 + s) + shift
        )
        for s in range(200)
    ]
    assert 0.91 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.985
    values = np.array([f.value for f in found])
    assert np.mean([f.stderr for f in found]) == pytest.approx(values.std(), rel=0.12)


def test_only_inceptions_distance_is_called_fid():
    assert fid.name("inception2015") == "fid"
    assert fid.name("efflite0") == "fd_efflite0"
    assert fid.name("inception") == "fd_inception"


def test_reference_statistics_round_trip(tmp_path):
    x, y = gaussians(50, 5), gaussians(60, 5, 0.3, seed=1)
    fid.save_moments(tmp_path / "ref.npz", fid.moments(y))
    again = fid.load_moments(tmp_path / "ref.npz")
    assert fid.frechet(fid.moments(x), again) == fid.frechet_distance(x, y).value


def test_statistics_that_are_none_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    (tmp_path / "c.npz").write_text("<html>")
    for name, message in (("a", "belong"), ("b", "sigma"), ("c", "statistics"), ("d", "No such")):
        with pytest.raises(DataError, match=message):
            fid.load_moments(tmp_path / f"{name}.npz")


def test_damaged_statistics_are_refused_in_one_way(tmp_path):
    """Cut short anywhere or with any byte of the compressed file changed; or a renamed `.npy`.

    A flip that the archive's checksums do not cover may leave the same statistics.
    """
    path, mu, sigma = tmp_path / "a.npz", np.arange(3.0), np.eye(3)
    np.savez_compressed(path, mu=mu, sigma=sigma)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="no reference statistics"):
            fid.load_moments(path)
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = fid.load_moments(path)
        except DataError as error:
            refused += "mu and sigma" in error.fix
        else:
            assert np.array_equal(found.mean, mu)
            assert np.array_equal(found.cov, sigma)
    assert refused > len(whole) / 2
    with open(path, "wb") as file:
        np.save(file, sigma)
    with pytest.raises(DataError, match="no reference statistics: a single array"):
        fid.load_moments(path)


def test_bad_features_are_refused():
    with pytest.raises(DataError, match="width"):
        fid.frechet_distance(gaussians(9, 4), gaussians(9, 5))
    with pytest.raises(DataError, match="non-finite"):
        fid.frechet_distance(gaussians(9, 4), np.full((9, 4), np.inf))
    with pytest.raises(DataError, match="widths"):
        fid.frechet(fid.moments(gaussians(9, 4)), fid.moments(gaussians(9, 5)))
