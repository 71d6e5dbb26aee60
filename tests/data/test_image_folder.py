"""Folders of pictures: captions, sizes, orientation, and one message for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.data import image_folder, pipeline
from cnxs_jax.data.image_folder import ImageFolder
from cnxs_jax.errors import ConfigError, DataError


def write(path, size=(40, 20), colour=(200, 30, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one captioned beside it and one in metadata.jsonl of a folder below."""
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red card\nnot this line\n")
    write(tmp_path / "below" / "b.jpg", colour=(10, 200, 10))
    line = {"file_name": "b.jpg", "text": "a green card"}
    (tmp_path / "below" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_both_kinds_of_captions_are_found_in_order(folder):
    source = ImageFolder(folder, 16)
    assert [source[i]["caption"] for i in range(len(source))] == ["a red card", "a green card"]
    np.testing.assert_array_equal(source[0]["image"], np.full((16, 16, 3), (200, 30, 60)))
    assert source[0]["original_size"].tolist() == [20, 40]


def test_the_centre_is_kept_and_nothing_is_squeezed(tmp_path):
    """A square in the middle of a wide picture stays a square in the middle."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[8:24, 40:56] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a square")
    image = ImageFolder(tmp_path, 32)[0]["image"]
    ys, xs = np.nonzero(image[..., 0] > 128)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (8, 23, 8, 23)


def test_each_picture_may_have_its_own_size(folder):
    source = ImageFolder(folder, 16)
    assert [source.read(i, 8, 10 + i)["image"].shape[:2] for i in range(2)] == [(8, 10), (8, 11)]


def test_exif_orientation_turns_the_picture_and_its_size(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :15] = 255  # its left half is white; turned by 90 degrees clockwise, its top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("half")
    source = ImageFolder(tmp_path, 16)
    image = source.read(0, 30, 10)["image"]
    assert image[:13].mean() > 250
    assert image[17:].mean() < 5
    assert source.original_sizes().tolist() == [[30, 10]]
    assert source[0]["original_size"].tolist() == [30, 10]


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    assert (ImageFolder(tmp_path, 8)[0]["image"] == 255).all()


def test_the_fingerprint_sees_captions(folder):
    before = ImageFolder(folder, 16).fingerprint
    assert ImageFolder(folder, 16).fingerprint == before
    (folder / "a.txt").write_text("another caption")
    assert ImageFolder(folder, 16).fingerprint != before


MISTAKES = {
    "no folder": (lambda d: d / "nowhere", "no such folder"),
    "no pictures": (lambda d: (d / "empty").mkdir() or d / "empty", "no pictures"),
    "no caption": (lambda d: write(d / "below" / "c.png") and d, "1 pictures without a caption"),
    "empty caption": (lambda d: (d / "a.txt").write_text(" \n") and d, "a.png"),
    "not text": (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe\x00x") and d, "not UTF-8"),
    "bad json": (
        lambda d: (d / "below" / "metadata.jsonl").write_text("{oops\n") and d,
        r"metadata.jsonl:1",
    ),
    "metadata not text": (
        lambda d: (d / "below" / "metadata.jsonl").write_bytes(b'{"text": "caf\xe9"}\n') and d,
        "not UTF-8.*metadata.jsonl",
    ),
    "absent picture": (
        lambda d: (
            (d / "below" / "metadata.jsonl").write_text('{"file_name": "gone.jpg", "text": "x"}')
            and d
        ),
        "gone.jpg is not in the folder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(folder, name):
    change, message = MISTAKES[name]
    with pytest.raises(DataError, match=message):
        ImageFolder(change(folder), 16)


def test_a_file_that_is_no_picture_is_named_when_it_is_read(folder):
    (folder / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="a.png"):
        ImageFolder(folder, 16)[0]


def test_a_truncated_picture_is_named(folder):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:4000])
    with pytest.raises(DataError, match="damaged picture"):
        ImageFolder(folder, 16)[0]


def test_a_bomb_is_refused_by_its_header(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="too many"):
        ImageFolder(folder, 16)[0]


def test_a_folder_of_pictures_is_a_source_like_any_other(tmp_path):
    for n in range(3):
        Image.new("RGB", (12, 8), (n, n, n)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"number {n}")
    source = pipeline.open_source("image_folder", size=8, root=tmp_path)
    loader = pipeline.make_loader(source, batch_size=3, prefetch=0)
    for batch in (next(loader), next(loader)):  # every picture once an epoch, with its caption
        shown = [f"number {image[0, 0, 0]}" for image in batch["image"]]
        assert shown == batch["caption"]
        assert sorted(shown) == ["number 0", "number 1", "number 2"]


def test_a_folder_source_needs_its_folder():
    with pytest.raises(ConfigError, match="needs a folder"):
        pipeline.open_source("image_folder")
