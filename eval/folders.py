"""Pictures, prompts and reference statistics from files that a user names."""

from pathlib import Path

import numpy as np

from cnxs_jax.data import image_folder
from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import fid
from eval.plan import Prompts


def paths_of(folder, where):
    """The pictures of a folder and those below it, sorted by name; DataError without any."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError("no such folder", str(root), f"{where}: a folder of pictures")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in image_folder.SUFFIXES)
    if not found:
        known = ", ".join(image_folder.SUFFIXES)
        raise DataError("no pictures in this folder", str(root), f"put pictures there ({known})")
    return found


def read(paths, size=None):
    """uint8 `[N, H, W, 3]`.

    Args:
        size: side in pixels to cover and cut the centre of; None: they must be of one size.

    Raises:
        DataError: a file that is no picture, or pictures of several sizes.
    """
    images = []
    for path in paths:
        with image_folder.opened(path) as picture:
            upright = image_folder.turned(picture)
            sides = (size, size) if size else (upright.height, upright.width)
            images.append(image_folder.covered(upright, *sides))
        if images[-1].shape != images[0].shape:
            (h, w), (height, width) = images[0].shape[:2], images[-1].shape[:2]
            what = f"{width} x {height} pixels, the others have {w} x {h}"
            raise DataError(what, str(path), "--size=256 cuts all to one size")
    return np.stack(images)


def captions_of(paths, root):
    """One caption a picture (`image_folder`'s layout), or None where one has none."""
    found = [e.caption for e in image_folder.described(paths, Path(root).expanduser())]
    return found if all(found) else None


def prompts(path, number, size=None):
    """The first `number` prompts of a text file (one a line) or of a folder of pictures with texts.

    Raises:
        ConfigError: neither; DataError: no prompts, pictures without captions.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        entries = image_folder.find(path)[:number]
        images = read([e.path for e in entries], size)
        return Prompts("test", [e.caption for e in entries], images=images)
    if not path.is_file():
        fix = "a text file with one prompt a line, or a folder of pictures with captions"
        raise ConfigError("no such file or folder", f"--prompts {path}", fix)
    lines = [line.strip() for line in image_folder.read_text(path).splitlines()]
    lines = [line for line in lines if line][:number]
    if not lines:
        raise DataError("no prompts", str(path), "one prompt a line")
    return Prompts("test", lines)


def reference(path, size=None):
    """Real pictures of a folder, uint8 `[M, H, W, 3]`, or the `fid.Moments` of an `.npz`."""
    if str(path).endswith(".npz"):
        return fid.load_moments(path)
    return read(paths_of(path, "--reference"), size)


def pairs(images, others):
    """The path of `others` for each of `images` by name without its ending, or None."""
    if [p.stem for p in images] == [p.stem for p in others]:
        return others
    named = {p.stem: p for p in others}
    unique = len(named) == len(others) and len({p.stem for p in images}) == len(images)
    found = [named.get(p.stem) for p in images]
    return found if unique and all(found) else None
