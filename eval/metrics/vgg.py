"""VGG16's convolutions in Linen (Simonyan & Zisserman 2015, table 1, column D).

Parameter names are torchvision's (`features.0` -> `features_0`): `vgg16-397923af.pth` by path.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.convert import rules
from eval.metrics import weights

# Channels of each convolution; between the stages the picture is halved by a maximum.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TABLE = rules.Table(ignore=(r"classifier\..*",))


class VGG16(nn.Module):
    """Normalised pictures `[B, H, W, 3]` to the activations that end the five stages.

    Returns:
        relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: `[B, H / 2^i, W / 2^i, C_i]`, rounded down.
    """

    @nn.compact
    def __call__(self, x):
        outs, index = [], 0  # the index of torchvision's list, which counts ReLUs and poolings
        for stage in STAGES:
            if outs:
                x = nn.max_pool(x, (2, 2), (2, 2))
                index += 1
            for features in stage:
                x = nn.relu(nn.Conv(features, (3, 3), padding=1, name=f"features_{index}")(x))
                index += 2
            outs.append(x)
        return tuple(outs)


def load(path):
    """VGG16's parameter tree from torchvision's file; the classifier is left out.

    Raises:
        CheckpointError: a missing or damaged file, or another network's.
    """
    return from_tensors(weights.read(path), str(path))


def from_tensors(tensors, where="weights"):
    """The parameter tree from PyTorch tensors {key: array}; see `load`."""
    module, example = VGG16(), jnp.zeros((1, 32, 32, 3))
    target = jax.eval_shape(lambda: module.init(jax.random.key(0), example))["params"]
    return rules.to_params(tensors, target, TABLE, where)
