"""The directory of a random MiDaS network of some thousand parameters, for tests."""

import json

import numpy as np

from cnxs_jax import tree
from cnxs_jax.convert import files, midas, rules

CONFIG = {
    "model_type": "dpt",
    "backbone_config": {
        "layer_type": "bottleneck",
        "global_padding": "SAME",
        "embedding_size": 8,
        "hidden_sizes": [32, 32, 32],
        "depths": [1, 1, 1],
        "num_groups": 4,
    },
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-6,
    "image_size": 64,
    "backbone_out_indices": [0, 1, 1, 2],
    "neck_hidden_sizes": [32, 32, 12, 8],
    "fusion_hidden_size": 8,
}


def params(seed=0):
    """Random parameters of the network of `CONFIG`; what it estimates has contrast."""
    rng = np.random.default_rng(seed)
    _, shapes = midas.shapes(**midas.fields_of(CONFIG, "tests"))
    flat = {}
    for path, leaf in tree.flatten(shapes).items():
        value = rng.normal(size=leaf.shape)
        if path.endswith("kernel"):
            value *= (2 / np.prod(leaf.shape[-4:-1] if leaf.ndim > 3 else leaf.shape[-2])) ** 0.5
        elif path.endswith("scale"):
            value = 1 + 0.1 * value
        flat[path] = value.astype(np.float32)
    flat["head/conv_4/kernel"] = np.abs(flat["head/conv_4/kernel"])  # never cut off at zero
    flat["head/conv_4/bias"] = np.ones(1, np.float32)
    return tree.unflatten(flat)


def write(directory, seed=0, config=CONFIG):
    """Writes one in transformers' layout and returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = rules.to_tensors(params(seed), midas.TRANSFORMERS)
    files.write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
