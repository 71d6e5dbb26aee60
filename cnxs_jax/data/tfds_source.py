"""Image-text data sets of TensorFlow Datasets, read without TensorFlow.

    builder = tfds.builder("coco_captions", data_dir="data", file_format="array_record")
    builder.download_and_prepare()

prepares one (that step may need TensorFlow); then `data.source = "coco_captions"` and
`data.root = "data"` train on it. `data.source = "tfds"` takes any prepared data set that has
pictures and texts: `data.root` is then its own directory.
"""

import io
import pathlib

import numpy as np

from cnxs_jax import errors
from cnxs_jax.data import image_folder

NAMES = ("coco_captions", "laion400m", "wit_kaggle", "tfds")
INFO = "dataset_info.json"
# Where texts stand, the first that is there: Karpathy's COCO has several a picture.
CAPTIONS = (
    *("caption", "captions/text", "captions", "text"),
    "caption_title_and_reference_description",  # wit_kaggle
)


class TfdsSource:
    """An indexable source: `source[i] -> {"image" uint8 [H,W,3], "caption", "original_size"}`.

    Of several captions number i mod n is taken, so that an example is the same whenever it is read.

    Args:
        name: one of `NAMES`.
        split: of the data set ("train", "train[:1%]").
        size: the side of the pictures, px.
        root: the `data_dir` that it was prepared in, or its own directory.

    Raises:
        DataError: not prepared there, no pictures or texts, a format without random access.
    """

    def __init__(self, name, split, size, root):
        import tensorflow_datasets as tfds

        self.directory = find(pathlib.Path(root).expanduser(), name)
        where = str(self.directory)
        try:
            builder = tfds.builder_from_directory(where)
            self.image, self.caption = columns(builder.info.features, where)
            skip = {self.image: tfds.decode.SkipDecoding()}
            self.examples = builder.as_data_source(split, decoders=skip)
        except errors.CnxsError:
            raise
        except Exception as error:  # tfds raises many kinds
            fix = 'prepare it with file_format="array_record", and check data.split'
            what = f"cannot be read: {errors.first_line(error)}"
            raise errors.DataError(what, where, fix) from None
        self.label = f"{builder.info.full_name}, {split}"
        self.size = size

    def __len__(self):
        return len(self.examples)

    def __repr__(self):
        return f"TfdsSource({self.label}, {len(self)} examples)"

    def __getitem__(self, index):
        return self.read(index, self.size, self.size)

    def read(self, index, height, width):
        """Example `index` in another size than the source's own, px."""
        example = self.examples[int(index)]
        with self._opened(example, index) as picture:
            upright = image_folder.turned(picture)
            image = image_folder.covered(upright, height, width)
        return {
            "image": image,
            "caption": self._caption(example, int(index)),
            "original_size": np.array([upright.height, upright.width], np.int32),
        }

    def original_sizes(self):
        """(height, width) of every picture, int32 [N,2], from their headers."""
        sizes = []
        for index in range(len(self)):
            with self._opened(self.examples[index], index) as picture:
                sizes.append(image_folder.upright_size(picture))
        return np.array(sizes, np.int32)

    def _opened(self, example, index):
        data = example[self.image]
        return image_folder.opened(io.BytesIO(data), f"{self.label}, example {index}")

    def _caption(self, example, index):
        for key in self.caption.split("/"):
            example = example[key]
        texts = [example] if isinstance(example, str | bytes) else list(example)
        if not texts:
            raise errors.DataError("a picture without a caption", f"{self.label}, example {index}")
        text = texts[index % len(texts)]
        return (text.decode("utf-8") if isinstance(text, bytes) else str(text)).strip()


def find(root, name):
    """The directory with `dataset_info.json` of a prepared data set, its newest version."""
    base = root if name == "tfds" or (root / INFO).is_file() else root / name
    found = sorted(p.parent for p in base.rglob(INFO)) if base.is_dir() else []
    if not found:
        fix = f"data.root: the data_dir in which {name} was prepared (file_format='array_record')"
        raise errors.DataError(f"no prepared data set {name}", str(base), fix)
    if len({p.parent for p in found}) > 1:
        names = ", ".join(str(p) for p in found[:4])
        raise errors.DataError(f"several data sets: {names}", str(base), "data.root: one of them")
    return max(found, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split(".")])


def columns(features, where):
    """`(picture's key, path of its text)` of a data set's features. Raises DataError."""
    import tensorflow_datasets as tfds

    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    texts = [path for path in CAPTIONS if has(features, path.split("/"))]
    if not images or not texts:
        what = f"no pictures with texts among {', '.join(features)}"
        raise errors.DataError(what, where, f"it needs an image and one of {', '.join(CAPTIONS)}")
    return images[0], texts[0]


def has(features, path):
    """Whether a nested feature is there and is no table of features itself."""
    for key in path:
        inner = getattr(features, "feature", features)  # of a sequence
        try:
            features = inner[key]
        except (KeyError, TypeError):
            return False
    return not hasattr(getattr(features, "feature", features), "keys")
