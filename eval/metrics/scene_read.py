"""Reads a scene by explaining it: the real sprites are fitted to what the detector proposes.

Analysis by synthesis. The detector of `scene_checker.py` proposes concepts and rough places. Each
proposal is matched against the picture with the world's own sprites (`scene_fit.py`), and the stack
of sprites (which, where, in which style, in which order) that best redraws the picture is kept.

What is reported as found:
  1. a fitted sprite that explains a fair part of the error under it (FAIR of it where the
     detector was sure of the concept, STRICT where it was not);
  2. a detection that the detector was sure of, although no sprite fits it well (a distorted object
     of a generated picture), unless sprites of rule 1 already stand on most of its place: then
     they explain the same pixels better, and the detection is contradicted.
"""

import dataclasses
import functools

import numpy as np

from eval.metrics import scene_checker, scene_fit

PROPOSAL = 0.06  # heat of a peak that is worth a fit
MOST_PROPOSALS, MOST_OBJECTS, MOST_TRIED = 12, 4, 5
FAIR, STRICT = 0.2, 0.5
COST = 40 * 30.0**2  # what an object must explain at least, squared levels
CONTRADICTED = 0.5  # part of a detection's place on which fitted sprites stand
NEAR = 6.0  # pixels within which two peaks of one concept are one object


def explain(picture, proposals):
    """The stack of poses (back to front) that explains a picture, and each one's proposal."""
    pool, stack, owners = list(proposals), [], []
    while pool and len(stack) < MOST_OBJECTS:
        pick = _next(picture, stack, pool)
        if pick is None:
            break
        detection, level, pose = pick
        pool.remove(detection)
        stack.insert(level, pose)
        owners.insert(level, detection)
    return _settle(picture, stack, owners)


def _next(picture, stack, pool):
    """(proposal, level, pose) that explains most of what a stack leaves, or None."""
    between = [picture.layers(stack, level) for level in range(len(stack) + 1)]
    left = picture.left(between[-1][0])
    tried = []
    for detection in pool:
        if picture.near(left, detection) < COST:
            continue
        # a sprite that touches none is the same at every level
        near = any(_close(picture.sprites, pose, detection) for pose in stack)
        for level in range(len(between)) if near else [len(stack)]:
            gain, pose = picture.starts(detection, between[level])[0]
            tried.append((gain, level, pose, detection))
    tried.sort(key=lambda row: -row[0])
    best = None
    for gain, level, pose, detection in tried[:MOST_TRIED]:
        if best is not None and gain < 0.6 * best[0]:
            break
        pose, gain, before = picture.refine(pose, between[level])
        bar = FAIR if detection.score >= scene_checker.THRESHOLD else STRICT
        if gain > COST and gain > bar * before and (best is None or gain > best[0]):
            best = gain, detection, level, pose
    return best and best[1:]


def _settle(picture, stack, owners):
    """Tries both orders of each overlapping pair, then refits every pose among the others."""
    for _ in range(2):
        before = list(stack)
        for i in range(len(stack) - 1):
            for j in range(i + 1, len(stack)):
                if touch(picture.sprites, stack[i], stack[j]):
                    _try_swap(picture, stack, owners, i, j)
        if len(stack) > 1:
            for i, pose in enumerate(stack):
                others = stack[:i] + stack[i + 1 :]
                if any(touch(picture.sprites, pose, o) for o in others):
                    stack[i] = picture.refine(pose, picture.layers(others, i))[0]
        if stack == before:
            break
    return stack, owners


def touch(sprites, a, b):
    """Whether two poses lie so near that their order may show."""
    reach = (sprites.extents[a.extent] + sprites.extents[b.extent]) / 2 + 2
    return abs(a.top - b.top) < reach and abs(a.left - b.left) < reach


def _close(sprites, pose, detection):
    """Whether a detection's sprite could touch a pose's."""
    y, x, extent = sprites.box(pose)
    reach = (extent + sprites.extents[-1]) / 2 + 6
    return abs(detection.y - y) < reach and abs(detection.x - x) < reach


def _try_swap(picture, stack, owners, i, j):
    """Swaps two levels in place if the picture is explained better after refitting both."""
    now = picture.error(stack)
    trial = list(stack)
    trial[i], trial[j] = trial[j], trial[i]
    for k in (j, i):
        trial[k] = picture.refine(trial[k], picture.layers(trial[:k] + trial[k + 1 :], k), 2)[0]
    if picture.error(trial) < now:
        stack[:] = trial
        owners[i], owners[j] = owners[j], owners[i]


def hidden(picture, stack, level):
    """The fraction of a pose's sprite that the poses above it cover."""
    alpha = np.zeros(picture.empty.shape[1:], np.float32)
    alpha[picture.window(stack[level])] = picture.sprites.canvas(stack[level])[3]
    over = picture.layers(stack, level + 1)[1][3]
    return float((alpha * over).sum() / alpha.sum())


def contradicted(picture, stack, detection):
    """Whether fitted sprites stand on most of the disc where a detection says its object is."""
    rows, columns = np.ogrid[: picture.empty.shape[1], : picture.empty.shape[2]]
    m = picture.sprites.margin
    apart = (rows - m + 0.5 - detection.y) ** 2 + (columns - m + 0.5 - detection.x) ** 2
    disc = apart < (0.35 * detection.size) ** 2
    return bool(disc.any()) and picture.layers(stack, 0)[1][3][disc].mean() > CONTRADICTED


def merge_peaks(detections):
    """The best of each concept's peaks that lie near each other, at most MOST_PROPOSALS in all."""
    kept = []
    for d in detections:
        twins = (k for k in kept if k.concept == d.concept)
        if all(np.hypot(d.y - k.y, d.x - k.x) > NEAR for k in twins):
            kept.append(d)
    return kept[:MOST_PROPOSALS]


def read_one(image, proposals, colour, sprites):
    """Detections of one picture, best first; see the module's text.

    Args:
        image: uint8 `[H, H, 3]`.
        proposals: `scene_checker.Detection`s, best first, down to PROPOSAL.
        colour: RGB of the background word.
        sprites: a `Sprites` for this size.
    """
    proposals = merge_peaks(proposals)
    picture = scene_fit.Picture(image, colour, sprites)
    stack, owners = explain(picture, proposals)
    found = []
    for level, (pose, owner) in enumerate(zip(stack, owners, strict=True)):
        y, x, size = sprites.box(pose)
        covered = float(hidden(picture, stack, level) > scene_checker.COVERED)
        style = sprites.world.styles[pose.style]
        found.append(
            dataclasses.replace(
                owner,
                style=style,
                y=y,
                x=x,
                size=size,
                covered=covered,
                score=max(owner.score, 0.5),
            )
        )
    for d in proposals:
        sure = d.score >= scene_checker.THRESHOLD and not any(d is o for o in owners)
        if sure and not contradicted(picture, stack, d):
            found.append(d)
    return sorted(found, key=lambda d: -d.score)


@functools.cache
def sprites_of(world, size):
    """The cached `Sprites` of a world (frozen and hashed by identity) for a picture size."""
    return scene_fit.Sprites(world, size)


def reader(params, vocabulary, world):
    """`read(images uint8 [N,H,H,3]) -> (list of detections an image, background words)`."""
    propose = scene_checker.reader(params, vocabulary, threshold=PROPOSAL)

    def read(images):
        proposals, words = propose(images)
        sprites = sprites_of(world, images.shape[1])
        found = [
            read_one(image, p, world.backgrounds[word], sprites)
            for image, p, word in zip(images, proposals, words, strict=True)
        ]
        return found, words

    return read
