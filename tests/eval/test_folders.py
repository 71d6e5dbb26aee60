"""Two folders of pictures, from Python and from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.control import hed
from cnxs_jax.errors import ConfigError, DataError
from eval import folders, run
from eval.metrics import fid
from tests.control import detector


def write(folder, images, names=None):
    folder.mkdir(exist_ok=True)
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{n if names is None else names[n]}.png")
    return folder


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)


def evaluated(a, b, out, **options):
    run.folders_of_pictures(str(a), str(b), out, run.Options(**options))
    return json.loads((out / "report.json").read_text())


def test_pictures_of_the_same_names_are_pairs(tmp_path, noise):
    names = [f"p{n}" for n in range(4)]
    a = write(tmp_path / "a", noise, names)
    b = write(tmp_path / "b", noise[::-1] // 2, names[::-1])
    found = evaluated(a, b, tmp_path / "out", metrics=("ssim", "agreement"))
    (line,) = found["rows"]
    expected = np.sqrt(((noise - noise // 2.0) ** 2 / 255**2).mean((1, 2, 3))).mean()
    assert line["rmse"]["value"] == pytest.approx(expected, rel=0.01)  # // rounds down
    assert line["rmse"]["n"] == 4
    assert line["sharpness"]["value"] == pytest.approx(4, rel=0.05)
    assert "steps" in line
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("samples.png") < text.index("| method |")


def test_maps_are_compared_as_grey_values(tmp_path):
    drawn = np.zeros((2, 16, 16, 3), np.uint8)
    drawn[:, 4] = 255
    asked = np.roll(drawn, 1, axis=1)
    a, b = write(tmp_path / "a", drawn), write(tmp_path / "b", asked)
    metrics = ("edges", "soft_edges", "masks", "depth")
    (line,) = evaluated(a, b, tmp_path / "out", metrics=metrics)["rows"]
    assert line["edge_f1@1px"]["value"] == 1
    assert line["hausdorff_px"]["value"] == 1
    assert line["mask_iou"]["value"] == 0
    assert line["soft_edge_distance"]["value"] == pytest.approx(2 / 16)
    assert line["depth_mse"]["value"] == pytest.approx(2 / 16)


def test_photographs_of_equal_names_are_no_maps(tmp_path, noise):
    a, b = write(tmp_path / "a", noise), write(tmp_path / "b", noise)
    with pytest.raises(DataError, match="picture 0 is coloured, a map is grey"):
        evaluated(a, b, tmp_path / "out", metrics=("edges",))


def test_soft_edges_of_photographs_are_compared_by_hed(tmp_path, noise):
    """Equal pictures have distance 0; the distance is that of the two detections."""
    weights, moved = detector.write(tmp_path / "hed"), np.roll(noise, 3, axis=1)
    a, b = write(tmp_path / "a", noise), write(tmp_path / "b", moved)
    given = {"metrics": ("hed",), "weights": {"hed": str(weights)}}
    (line,) = evaluated(a, a, tmp_path / "same", **given)["rows"]
    assert line["hed_distance"]["value"] == 0
    (line,) = evaluated(a, b, tmp_path / "out", **given)["rows"]
    drawn, asked = (hed.edges(x, str(weights)) for x in (noise, moved))
    assert line["hed_distance"]["value"] == pytest.approx(np.abs(drawn - asked).mean(), rel=1e-5)
    assert line["hed_distance"]["value"] > 0.001


def test_stored_statistics_serve_frechet_distances_only(tmp_path, noise, monkeypatch):
    a = write(tmp_path / "a", noise)
    means = noise.reshape(4, -1, 3).mean(1)
    fid.save_moments(tmp_path / "stats.npz", fid.moments(means + 2))
    monkeypatch.setattr(run.measures, "check_weights", lambda *args: None)
    opened = {"efflite0": ("efflite0", lambda x: x.reshape(len(x), -1, 3).mean(1))}
    monkeypatch.setattr(run.Options, "tools", lambda self: run.networks.Tools(extractors=opened))
    found = evaluated(a, tmp_path / "stats.npz", tmp_path / "out", metrics=("fd",))
    (line,) = found["rows"]
    assert line["fd_efflite0"]["value"] == pytest.approx(3 * 2**2, rel=1e-6)
    assert "fid" not in line
    with pytest.raises(ConfigError, match="'kid' needs real pictures, not their statistics"):
        evaluated(a, tmp_path / "stats.npz", tmp_path / "out", metrics=("kid",))


def test_folders_that_cannot_be_read(tmp_path, noise):
    a = write(tmp_path / "a", noise)
    wide = write(tmp_path / "wide", [*noise, noise[0, :10]])
    with pytest.raises(DataError, match="24 x 10 pixels, the others have 24 x 20") as caught:
        folders.read(folders.paths_of(wide, "--images"))
    assert "--size" in caught.value.fix
    assert folders.read(folders.paths_of(wide, "--images"), 8).shape == (5, 8, 8, 3)
    with pytest.raises(DataError, match="no such folder"):
        folders.paths_of(tmp_path / "absent", "--images")
    with pytest.raises(ConfigError, match="'ssim' needs pictures to pair with"):
        evaluated(a, write(tmp_path / "b", noise, "wxyz"), tmp_path / "out", metrics=("ssim",))
    options = {"metrics": ("clip_score",), "weights": {"clip": str(tmp_path)}}
    with pytest.raises(ConfigError, match="needs captions"):
        evaluated(a, a, tmp_path / "out", **options)


def test_captions_beside_every_picture_or_none(tmp_path, noise):
    a = write(tmp_path / "a", noise[:2])
    paths = folders.paths_of(a, "--images")
    assert folders.captions_of(paths, a) is None
    for path in paths:
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n")
    assert folders.captions_of(paths, a) == ["picture 0", "picture 1"]
    found = folders.prompts(a, 1)
    assert found.captions == ["picture 0"]
    np.testing.assert_array_equal(found.images, noise[:1])


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "eval", *map(str, words)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path, noise):
    a, b = write(tmp_path / "a", noise), write(tmp_path / "b", noise // 2)
    folders_of = ["--images", a, "--reference", b]
    code, out, err = command(*folders_of, "--metrics=psnr", "--out", tmp_path / "out")
    said = [line for line in err.splitlines() if "Grain" not in line]  # its own, on older jaxlib
    assert (code, said) == (0, [])
    assert "| a |" in out
    assert (tmp_path / "out" / "report.md").is_file()
    code, out, err = command(*folders_of, "--metrics=psnt", "--out", tmp_path / "out")
    assert code == 2
    assert "error: unknown metric 'psnt'. Did you mean \"psnr\"? [--metrics]" in err
    code, out, err = command("--pipeline=x", "--sweep", "guidance_scal=1:8", "--out=x")
    assert code == 2
    assert 'Did you mean "guidance_scale"?' in err
    assert "Traceback" not in err
