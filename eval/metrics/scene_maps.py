"""Maps of drawn scenes: edges, what is no background, and depth; what control is measured by.

Each detector runs on the pictures that a controller drew and on the scenes that its control
pictures were made of, so that what it gets wrong is in the ceiling, too (the row "real scenes").
"""

import itertools

import numpy as np

from cnxs_jax.control import hints
from cnxs_jax.data import emoji_scenes
from eval.metrics import scene_accuracy, scene_checker, scene_fit, scene_read

SOLID = 0.5  # alpha from which a pixel belongs to a sprite


def edges(images):
    """Canny edges bool `[N, H, W]` of uint8 pictures `[N, H, W, 3]` at the usual thresholds."""
    return hints.canny(images)[..., 0] > 0


def foreground(images):
    """Pixels bool `[N, H, W]` whose colour is not that of the picture's border."""
    found = np.zeros(images.shape[:3], bool)
    for n, image in enumerate(images):
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        colour = scene_fit.background_colour(image, np.median(border, 0))
        apart = ((image.astype(np.float32) - colour) ** 2).sum(-1)
        found[n] = apart > scene_fit.BACKGROUND_NEAR**2
    return found


def depth_reader(params, vocabulary, world):
    """`read(images uint8 [N,H,H,3], depth [N,H,H]) -> depth ranks [N,H,H]` by fitted sprites.

    The stack of sprites that explains a picture best (`scene_read`) says which lies in front where
    they overlap. Sprites that do not touch have no order in the picture: of the orders that the
    overlaps leave open, the one nearest to the asked `depth` counts.
    """
    propose = scene_checker.reader(params, vocabulary, threshold=scene_read.PROPOSAL)

    def read(images, depth):
        proposals, words = propose(images)
        sprites = scene_read.sprites_of(world, images.shape[1])
        found = []
        for image, near, word, asked in zip(images, proposals, words, depth, strict=True):
            picture = scene_fit.Picture(image, world.backgrounds[word], sprites)
            stack, _ = scene_read.explain(picture, scene_read.merge_peaks(near))
            found.append(best_order(picture, stack, asked))
        return np.stack(found)

    return read


def best_order(picture, stack, asked):
    """Ranks `[H, W]` (0 = background) of a stack, in the open order with the least error."""
    pairs = itertools.combinations(range(len(stack)), 2)
    fixed = [(a, b) for a, b in pairs if scene_read.touch(picture.sprites, stack[a], stack[b])]
    shapes, best = [_solid(picture, pose) for pose in stack], None
    for order in itertools.permutations(range(len(stack))):
        if any(order.index(a) > order.index(b) for a, b in fixed):
            continue
        ranks = np.zeros(asked.shape, np.float64)
        for rank, which in enumerate(order, 1):
            ranks[shapes[which]] = rank
        error = ((ranks - asked) ** 2).sum()
        if best is None or error < best[0]:
            best = error, ranks
    return best[1]


def _solid(picture, pose):
    """Pixels bool `[H, W]` of a pose, the padding cut off."""
    alpha = np.zeros(picture.empty.shape[1:], np.float32)
    alpha[picture.window(pose)] = picture.sprites.canvas(pose)[3]
    m = picture.sprites.margin
    return alpha[m:-m, m:-m] >= SOLID


def load_depth_reader():
    """`depth_reader` with the shipped checker; CheckpointError if it is missing or damaged."""
    return depth_reader(*scene_checker.load(scene_accuracy.CHECKER), emoji_scenes.world())
