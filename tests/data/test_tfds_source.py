"""TFDS image-text data sets by name: a tiny one in the form of `coco_captions`, read as it is."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cnxs_jax.data import pipeline, tfds_source
from cnxs_jax.errors import ConfigError, DataError
from train import inputs

SIZES = [(40, 30), (24, 48), (32, 32)]
CAPTIONS = [["a cat", "an animal"], ["a dog runs"], ["a tree", "wood", "green"]]


def png(number):
    height, width = SIZES[number]
    pixels = np.full((height, width, 3), 10 * number, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def build(root, features, examples):
    """Prepares a data set called `coco_captions` below `root`, without TensorFlow."""
    import tensorflow_datasets as tfds

    class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Three pictures."""

        VERSION = tfds.core.Version("1.1.0")

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    CocoCaptions(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        "image/filename": tfds.features.Text(),
    }
    examples = [
        {
            "image": png(n),
            "captions": [{"text": text, "id": i} for i, text in enumerate(texts)],
            "image/filename": f"{n}.jpg",
        }
        for n, texts in enumerate(CAPTIONS)
    ]
    return build(tmp_path_factory.mktemp("tfds"), features, examples)


def by_number(source):
    """{number: (position, example)}; TFDS shuffles what it writes."""
    found = {}
    for position in range(len(source)):
        example = source[position]
        found[int(example["image"][0, 0, 0]) // 10] = position, example
    return found


@pytest.mark.parametrize("name", ["coco_captions", "tfds"])
def test_pictures_captions_and_sizes(prepared, name):
    source = pipeline.open_source(name, "train", 16, root=prepared)
    assert len(source) == 3
    found = by_number(source)
    assert set(found) == {0, 1, 2}
    for number, (position, example) in found.items():
        assert example["image"].shape == (16, 16, 3)
        assert example["image"].dtype == np.uint8
        texts = CAPTIONS[number]
        assert example["caption"] == texts[position % len(texts)]
        assert tuple(example["original_size"]) == SIZES[number]
        assert tuple(source.original_sizes()[position]) == SIZES[number]
    assert source.read(0, 32, 16)["image"].shape == (32, 16, 3)
    assert "coco_captions/1.1.0, train, 3 examples" in repr(source)


def test_training_reads_it_by_name(prepared):
    config = ConfigDict({"data": {"source": "coco_captions", "root": str(prepared), "size": 16,
                                  "split": "train", "num_examples": 2},
                         "batch_size": 2, "seed": 0})  # fmt: skip
    loader, _ = inputs.open_loader(config, tokens=False)
    batch = next(loader)
    assert batch["image"].shape == (2, 16, 16, 3)
    assert len(batch["caption"]) == 2
    config.data.num_examples = 4
    with pytest.raises(ConfigError, match="4 examples of 3"):
        inputs.open_source(config)


def test_what_is_not_there_is_named(prepared, tmp_path):
    with pytest.raises(DataError, match="no prepared data set laion400m"):
        pipeline.open_source("laion400m", root=prepared)
    with pytest.raises(DataError, match=r"cannot be read.*\n.*data.split"):
        pipeline.open_source("coco_captions", "validation", root=prepared)
    with pytest.raises(ConfigError, match='Did you mean "coco_captions"'):
        pipeline.open_source("coco_caption", root=prepared)
    import tensorflow_datasets as tfds

    build(tmp_path, {"label": tfds.features.Text()}, [{"label": "a"}])
    with pytest.raises(DataError, match="no pictures with texts among label"):
        tfds_source.TfdsSource("coco_captions", "train", 16, tmp_path)
