"""CLIP's image and text embeddings, from a transformers directory of a whole `CLIPModel`.

A figure is named after the network (`Clip.name`): clip_b16_224, clip_l14_336, ... The pictures are
prepared as transformers' slow processor does: the shorter side to the network's size (bicubic,
antialiased, in 8 bits), the centre cut out.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import families, files, rules
from cnxs_jax.data import image_folder
from cnxs_jax.errors import CheckpointError, first_line
from eval.metrics import inputs

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WIDTHS = {768: "b", 1024: "l", 1280: "h", 1664: "g"}  # of the image tower: ViT-B, -L, -H, -bigG
CMMD = "clip_l14_336"
LAYOUT = "a directory of transformers' CLIPModel: config.json, model.safetensors, the tokenizer"


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers: `(module, params)` each, and the tokenizer.

    Attributes:
        text, image: towers with projection.
        tokenizer: `tokenizer(texts, ...)`, as transformers' are.
    """

    text: tuple
    image: tuple
    tokenizer: object

    @property
    def name(self):
        """Of figures on these embeddings."""
        module = self.image[0]
        size = WIDTHS.get(module.hidden_size, f"w{module.hidden_size}_")
        return f"clip_{size}{module.patch_size}_{module.image_size}"

    def embed_images(self, images, batch_size=16):
        """uint8 `[N, H, W, 3]` -> float32 `[N, P]`, not normalised."""
        module, params = self.image
        size = module.image_size
        small = (prepare(image, size) for image in inputs.images(images, "clip"))
        apply = jax.jit(lambda p, x: module.apply({"params": p}, x))
        with jax.default_matmul_precision("highest"):
            return inputs.in_batches(lambda x: apply(params, x), batch_size, np.stack(list(small)))

    def embed_texts(self, texts, batch_size=64):
        """Texts -> float32 `[N, P]`, not normalised; what is too long is cut, as in CLIP's use."""
        module, params = self.text
        length = module.max_position_embeddings
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)
        ids = np.asarray(ids["input_ids"], np.int32)
        apply = jax.jit(lambda p, x: module.apply({"params": p}, x)["pooled"])
        with jax.default_matmul_precision("highest"):
            return inputs.in_batches(lambda x: apply(params, x), batch_size, ids)


def prepare(image, size):
    """uint8 `[H, W, 3]` -> float32 `[size, size, 3]` as CLIP reads it."""
    from PIL import Image

    small = image_folder.covered(Image.fromarray(image), size, size)
    return (np.asarray(small, np.float32) / 255 - MEAN) / DEVIATION


def load_clip(directory):
    """`Clip` of a directory.

    Raises:
        CheckpointError: no such directory, or one that does not hold both towers.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError("no CLIP there (no config.json)", str(directory), LAYOUT)
    config = files.read_config(directory / "config.json")
    if not {"text_config", "vision_config"} <= set(config):
        raise CheckpointError("the config has not both towers", str(directory), LAYOUT)
    tensors = files.read_tensors(files.find_weights(directory))
    text = _tower(tensors, config, "text", "CLIPTextModelWithProjection", directory)
    image = _tower(tensors, config, "visual", "CLIPVisionModelWithProjection", directory)
    return Clip(text, image, _tokenizer(directory))


def _tower(tensors, config, projection, kind, directory):
    """(module, params) of one tower of the joint checkpoint."""
    name = "text" if projection == "text" else "vision"
    fields = {k: v for k, v in config[f"{name}_config"].items() if v is not None}
    # The joint config's width stands above the towers'; old files leave it out (512).
    fields |= {"architectures": [kind], "projection_dim": config.get("projection_dim", 512)}
    family = families.family_of(fields, str(directory))
    fields["model_type"] = family.supported.get("model_type", (None,))[0]
    module, target = families.build(family, fields, str(directory))
    prefixes = (f"{name}_model.", f"{projection}_projection.")
    own = {k: v for k, v in tensors.items() if k.startswith(prefixes)}
    params = rules.to_params(own, target, family.table, str(directory), np.float32)
    return module, jax.tree.map(jnp.asarray, params)


def _tokenizer(directory):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        what = f"no tokenizer: {first_line(error)[:200]}"
        raise CheckpointError(what, str(directory), LAYOUT) from None
