"""Emoji scenes as a TFDS builder that needs no TensorFlow.

    from cnxs_jax.data.emoji_scenes import EmojiScenes
    builder = EmojiScenes(data_dir=DIR, config="tiny", file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")     # source[i] -> {"image", "caption", ...}

Images are handed over as encoded PNG: TFDS would need TensorFlow to encode arrays.
"""

import dataclasses
import io
import json

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cnxs_jax.data import emoji_scenes, scenes


@dataclasses.dataclass
class EmojiScenesConfig(tfds.core.BuilderConfig):
    """Picture side in px, and how many scenes of `train` and of each other split to write."""

    size: int = 64
    train: int = 20_000
    other: int = 1_000


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of `emoji_scenes.world()` with their exact truth, frozen on disk."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        EmojiScenesConfig(name="default", description="20,000 training scenes, 64 px"),
        EmojiScenesConfig(name="tiny", description="for tests", train=32, other=8),
    ]

    def _info(self):
        size = self.builder_config.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "masks": tfds.features.Tensor(shape=(None, size, size), dtype=np.uint8),
            "edges": tfds.features.Tensor(shape=(size, size), dtype=np.uint8),
            "depth": tfds.features.Tensor(shape=(size, size), dtype=np.uint8),
            "facts": tfds.features.Text(),  # JSON: objects, background, style, relation, prompt
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("caption", "image"),
            description=__doc__.split("\n")[0],
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        counts = {s: config.train if s == "train" else config.other for s in scenes.SPLITS}
        return {split: self._generate_examples(split, n) for split, n in counts.items()}

    def _generate_examples(self, split, count):
        source = scenes.SceneSource(
            emoji_scenes.world(), split, self.builder_config.size, truth=True
        )
        for index in range(count):
            yield index, encode(source[index])


def encode(scene):
    """A scene as TFDS stores it: PNG bytes, uint8 truth, and the facts as JSON."""
    png = io.BytesIO()
    Image.fromarray(scene["image"]).save(png, "PNG")
    names = ("objects", "background", "style", "relation", "prompt")
    return {
        "image": png.getvalue(),
        "caption": scene["caption"],
        "masks": scene["masks"].astype(np.uint8),
        "edges": scene["edges"].astype(np.uint8),
        "depth": scene["depth"],
        "facts": json.dumps({name: scene[name] for name in names}),
    }
