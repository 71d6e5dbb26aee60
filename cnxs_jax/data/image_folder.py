"""A folder of your own pictures: `a.jpg` beside `a.txt`, or `metadata.jsonl` beside the pictures.

    photos/cat.jpg  photos/cat.txt                      one caption a picture, the first line counts
    photos/metadata.jsonl                               {"file_name": "cat.jpg", "text": "a cat"}

The second is the convention of Hugging Face's `imagefolder`; a line may also have a "style", the
words that name the picture's (`configs/pixart_style.py` reads it). Pictures are turned as their
EXIF tag says, laid on white where they are transparent, scaled to cover the wanted size, and cut at
the centre.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from cnxs_jax import errors
from cnxs_jax.data import pixels

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
METADATA = "metadata.jsonl"
MAX_PIXELS = 2**28  # a header that promises more is refused before anything is decoded
SHOWN = 3  # names in an error


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture: its file, its caption and, where it has one, its style's words."""

    path: pathlib.Path
    caption: str
    style: str | None = None


class ImageFolder:
    """An indexable source: `source[i] -> {"image" uint8 [H,W,3], "caption", "original_size"}`.

    With `style` where `metadata.jsonl` has it.

    Args:
        root: the folder; pictures in folders below it are found too.
        size: the side of the pictures, px.

    Raises:
        DataError: no folder, no pictures, a picture without a caption, a broken `metadata.jsonl`;
            and when an example is read, a file that is not a picture.
    """

    def __init__(self, root, size):
        self.root = pathlib.Path(root).expanduser()
        self.entries = find(self.root)
        self.size = size
        listing = "\n".join(f"{e.path.relative_to(self.root)}\t{e.caption}" for e in self.entries)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.entries)

    def __repr__(self):
        return f"ImageFolder({len(self)} pictures, {self.fingerprint})"

    def __getitem__(self, index):
        return self.read(index, self.size, self.size)

    def read(self, index, height, width):
        """Example `index` in another size than the source's own, px."""
        entry = self.entries[int(index)]
        with opened(entry.path) as picture:
            upright = turned(picture)
            image = covered(upright, height, width)
        size = np.array([upright.height, upright.width], np.int32)
        found = {"image": image, "caption": entry.caption, "original_size": size}
        return found | ({"style": entry.style} if entry.style else {})

    def original_sizes(self):
        """(height, width) of every picture, int32 [N, 2], from the files' headers."""
        sizes = []
        for entry in self.entries:
            with opened(entry.path) as picture:
                sizes.append(upright_size(picture))
        return np.array(sizes, np.int32)


def find(root):
    """The pictures of a folder with their captions, sorted by path."""
    if not root.is_dir():
        raise errors.DataError("no such folder", str(root), "data.root: a folder of pictures")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        fix = f"put pictures there ({', '.join(SUFFIXES)}), each with a .txt caption"
        raise errors.DataError("no pictures in this folder", str(root), fix)
    found = described(paths, root)
    bare = [str(e.path.relative_to(root)) for e in found if not e.caption]
    if bare:
        names = ", ".join(bare[:SHOWN]) + (", ..." if len(bare) > SHOWN else "")
        fix = f"write {pathlib.Path(bare[0]).with_suffix('.txt')}, or a line in {METADATA}"
        raise errors.DataError(f"{len(bare)} pictures without a caption: {names}", str(root), fix)
    return found


def described(paths, root):
    """The `Entry` of each picture; its caption is None where nothing in `root` has one."""
    written = {}
    for file in sorted(root.rglob(METADATA)):
        written |= read_metadata(file)
    return [written.get(p) or Entry(p, text_beside(p)) for p in paths]


def text_beside(path):
    """The first line of the .txt file of a picture, or None."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    lines = read_text(file).strip().splitlines()
    return lines[0].strip() if lines else None


def read_text(file):
    """The file's text; DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.DataError(f"not UTF-8 text: {error}", str(file), "save it as UTF-8") from None


def read_metadata(file):
    """{picture's path: `Entry`} of a `metadata.jsonl`; pictures that it names must be there."""
    entries = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
            path, caption = file.parent / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            fix = 'one JSON object a line: {"file_name": "cat.jpg", "text": "a cat"}'
            raise errors.DataError(f"cannot be read: {error!r}", where, fix) from None
        if not isinstance(caption, str) or not caption.strip():
            raise errors.DataError(f"no caption for {row['file_name']}", where)
        if not path.is_file():
            raise errors.DataError(f"{row['file_name']} is not in the folder", where)
        style = row.get("style")  # words, or another data set's own column of that name
        style = style.strip() if isinstance(style, str) else None
        entries[path] = Entry(path, caption.strip(), style or None)
    return entries


def upright_size(picture):
    """(height, width) of an opened picture as it is seen."""
    width, height = picture.size
    swapped = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientation: on its side
    return (width, height) if swapped else (height, width)


def opened(path, where=None):
    """The picture's header, read; its pixels are decoded later. A context manager.

    `path` may be an open file; errors then name `where`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        where = str(where or path)
        raise errors.DataError(
            f"not a picture: {error}", where, "remove it, or give a PNG or JPG"
        ) from None
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        what = f"{picture.width} x {picture.height} pixels are too many"
        raise errors.DataError(what, str(where or path), f"at most {MAX_PIXELS} pixels")
    return picture


def turned(picture):
    """RGB as `pixels.rgb` makes it, upright."""
    from PIL import ImageOps

    name = str(getattr(picture, "filename", "picture"))
    try:
        return pixels.rgb(ImageOps.exif_transpose(picture), name)
    except errors.ConfigError as error:
        raise errors.DataError(error.what, name, error.fix) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise errors.DataError(f"damaged picture: {error}", name, "remove it") from None


def covered(picture, height, width):
    """uint8 [height, width, 3]: scaled (bicubic) until it covers the size, cut at the centre."""
    from PIL import Image

    scale = max(height / picture.height, width / picture.width)
    # Rounded down, as torchvision and transformers do.
    size = (max(int(picture.width * scale), width), max(int(picture.height * scale), height))
    if size != picture.size:
        picture = picture.resize(size, Image.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))
