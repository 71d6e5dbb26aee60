"""LPIPS, version 0.1, on VGG16: the learned perceptual distance of two pictures.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", equation (1): squared
differences of channel-normalised activations, weighted by channel, averaged over positions and
summed over five layers. Weights come by path: torchvision's VGG16 and the package's linear heads
(`lpips/weights/v0.1/vgg.pth`). On another VGG16 it is not LPIPS.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import rules
from eval.metrics import inputs, vgg, weights

# ImageNet's mean and deviation for inputs in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10
HEADS = rules.Table(rules=(rules.Rule("lin{n}.model.1.weight", ("lin.{n}.weight",), squeeze=True),))


class LPIPS(nn.Module):
    """Paired pictures `[B, H, W, 3]` in [-1, 1] to distances `[B]`; 32 px and more."""

    @nn.compact
    def __call__(self, a, b):
        pair = (jnp.concatenate([a, b]) - SHIFT[None, None, None]) / SCALE[None, None, None]
        total = 0.0
        for i, h in enumerate(vgg.VGG16(name="vgg")(pair)):
            h = h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + EPSILON)
            squared = jnp.square(h[: len(a)] - h[len(a) :])
            weight = self.param(f"lin_{i}", nn.initializers.ones, (h.shape[-1],))
            total += (squared * weight[None, None, None]).mean((1, 2)).sum(-1)
        return total


def load(vgg_path, heads_path):
    """LPIPS's parameter tree from the files of VGG16 and of the linear heads.

    Raises:
        CheckpointError: a missing or damaged file, or another network's.
    """
    heads = heads_from_tensors(weights.read(heads_path), str(heads_path))
    return {"vgg": vgg.load(vgg_path), **heads}


def heads_from_tensors(tensors, where="weights"):
    """{"lin_0": `[64]`, ...} from the linear heads' PyTorch tensors {key: array}."""
    target = {
        f"lin_{i}": {"kernel": jax.ShapeDtypeStruct((stage[-1], 1), jnp.float32)}
        for i, stage in enumerate(vgg.STAGES)
    }
    heads = rules.to_params(tensors, target, HEADS, where)
    return {name: head["kernel"][:, 0] for name, head in heads.items()}


def distance(params, batch_size=8):
    """`lpips(images, reference) -> float32 [N]` for paired uint8 pictures `[N, H, W, 3]`."""
    module = LPIPS()
    apply = jax.jit(lambda p, *pair: module.apply({"params": p}, *(x / 127.5 - 1 for x in pair)))

    def lpips(images, reference):
        a, b = inputs.image_pairs(images, reference, "lpips")
        pair = (a.astype(np.float32), b.astype(np.float32))
        with jax.default_matmul_precision("highest"):  # one figure on every accelerator
            return inputs.in_batches(lambda *x: apply(params, *x), batch_size, *pair)

    return lpips
