"""Fits the world's sprites to a picture: which pose redraws its pixels best.

Errors are truncated squared colour distances, so that an occluder or a smudge costs no more than
its area. Picture and sprites are both smoothed by a 3x3 binomial filter before they are compared:
this changes nothing for a sharp picture and forgives the blur of an autoencoder.
"""

import dataclasses
import functools

import numpy as np

from cnxs_jax.data import layout

TRUNCATE = 90.0**2  # largest error of a pixel, squared RGB distance in levels
BACKGROUND_NEAR = 45.0  # levels within which a border pixel belongs to the background


@dataclasses.dataclass(frozen=True)
class Pose:
    """A sprite in the picture: indices of style and extent; top left of its canvas, padded px."""

    concept: str
    style: int
    extent: int
    top: int
    left: int


def smooth(x):
    """3x3 binomial filter of the last two axes, edges repeated."""
    for axis in (-1, -2):
        x = np.moveaxis(x, axis, 0)
        x = (np.concatenate([x[:1], x[:-1]]) + 2 * x + np.concatenate([x[1:], x[-1:]])) / 4
        x = np.moveaxis(x, 0, axis)
    return x


class Sprites:
    """The world's sprites, smoothed, centred on square canvases of even side, kept by concept.

    Attributes:
        extents: their longer sides, px; side: of a canvas; margin: padding around a picture.
    """

    def __init__(self, world, size):
        self.world, self.size = world, size
        own = {round(f * size) for f in layout.EXTENT}
        self.extents = np.array(sorted(own))
        self.side = (int(self.extents[-1]) + 4 + 1) // 2 * 2
        self.margin = self.side // 2
        self.of = functools.cache(self._build)

    def _build(self, concept):
        """(full [styles, extents, 4, side, side], matrix [styles * extents, 9 * (side / 2)^2]).

        Channels of `full` are premultiplied RGB in levels and alpha. The matrix has, at half size,
        rgb, alpha, |rgb|^2, alpha * rgb and alpha^2: see `Picture.starts`.
        """
        shape = (len(self.world.styles), len(self.extents), 4, self.side, self.side)
        full = np.zeros(shape, np.float32)
        for s, style in enumerate(self.world.styles):
            for e, extent in enumerate(self.extents):
                rgb, alpha, _ = self.world.sprite(concept, style, int(extent))
                h, w = alpha.shape[:2]
                y, x = (self.side - h) // 2, (self.side - w) // 2
                full[s, e, :3, y : y + h, x : x + w] = np.moveaxis(rgb, -1, 0)
                full[s, e, 3, y : y + h, x : x + w] = alpha[..., 0]
        full = np.ascontiguousarray(smooth(full))
        rgb, alpha = full[:, :, :3], full[:, :, 3:]
        products = [rgb, alpha, (rgb * rgb).sum(2, keepdims=True), alpha * rgb, alpha * alpha]
        matrix = halve(np.concatenate(products, 2))
        return full, matrix.reshape(shape[0] * shape[1], -1)

    def canvas(self, pose):
        """[4, side, side] of a pose."""
        return self.of(pose.concept)[0][pose.style, pose.extent]

    def box(self, pose):
        """(y, x, extent): centre and longer side of a pose's sprite in the picture, px."""
        shape = self.world.sprite(
            pose.concept, self.world.styles[pose.style], int(self.extents[pose.extent])
        )[2].shape
        y, x = (
            start - self.margin + (self.side - n) // 2 + n / 2
            for start, n in zip((pose.top, pose.left), shape, strict=True)
        )
        return y, x, float(self.extents[pose.extent])


def halve(x):
    """2x2 means of the last two axes."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def background_colour(image, word_colour):
    """Median of the border pixels near the word's colour: a generated picture's may be off."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
    colour = np.array(word_colour, np.float32)
    near = border[((border - colour) ** 2).sum(-1) < BACKGROUND_NEAR**2]
    return np.median(near, 0).astype(np.float32) if len(near) else colour


class Picture:
    """One picture being explained: padded, smoothed, with the current stack of poses."""

    def __init__(self, image, colour, sprites):
        m = sprites.margin
        self.sprites = sprites
        self.colour = background_colour(image, colour)
        size = (3, image.shape[0] + 2 * m, image.shape[1] + 2 * m)
        self.empty = np.broadcast_to(self.colour[:, None, None], size).astype(np.float32)
        target = self.empty.copy()
        target[:, m:-m, m:-m] = np.moveaxis(image, -1, 0)
        self.target = smooth(target)

    def layers(self, stack, level):
        """(under [3,H,W], over [4,H,W]): what lies below and above `level` of a stack."""
        under, over = self.empty.copy(), np.zeros((4, *self.empty.shape[1:]), np.float32)
        for i, pose in enumerate(stack):
            canvas = self.sprites.canvas(pose)
            rows, columns = self.window(pose)
            if i < level:
                part = under[:, rows, columns]
                part *= 1 - canvas[3]
                part += canvas[:3]
            else:
                part = over[:, rows, columns]
                part *= 1 - canvas[3]
                part += canvas
        return under, over

    def window(self, pose):
        side = self.sprites.side
        return slice(pose.top, pose.top + side), slice(pose.left, pose.left + side)

    def error(self, stack):
        """Truncated error of a stack, summed over the picture."""
        return self._truncated(self.target - self.layers(stack, len(stack))[0])

    def left(self, drawn):
        """Truncated error of each pixel [H,W] of a drawing."""
        return np.minimum(((self.target - drawn) ** 2).sum(0), TRUNCATE)

    def near(self, errors, detection):
        """Sum of an error map over the square of a detection."""
        m, half = self.sprites.margin, detection.size / 2
        rows, columns = (
            slice(max(int(c + m - half), 0), int(c + m + half) + 1)
            for c in (detection.y, detection.x)
        )
        return float(errors[rows, columns].sum())

    @staticmethod
    def _truncated(difference, axis=None):
        squares = np.einsum("...cij,...cij->...ij", difference, difference)
        return np.minimum(squares, TRUNCATE, out=squares).sum((-1, -2))

    def gains(self, concept, styles, extents, tops, lefts, layers):
        """How much each pose lowers the error between two layers.

        Returns:
            (gain, before) `[tops, lefts, styles, extents]`; `before` is the error that the layers
            alone leave where the pose's alpha is, so gain / before is the part explained.
        """
        under, over = layers
        top_extent = int(self.sprites.extents[max(extents)])
        trim = max((self.sprites.side - top_extent) // 2 - 2, 0)
        side = self.sprites.side - 2 * trim
        inner = slice(trim, trim + side)
        full = self.sprites.of(concept)[0][np.ix_(styles, extents)][..., inner, inner]
        rgb, keep = full[:, :, :3], 1 - full[:, :, 3:]
        solid = full[:, :, 3] > 0.3
        shape = (len(tops), len(lefts), len(styles), len(extents))
        gain, before = np.empty(shape, np.float32), np.empty(shape, np.float32)
        covered = bool(over[3].any())
        for i, top in enumerate(tops):
            rows = slice(top + trim, top + trim + side)
            for j, left in enumerate(lefts):
                columns = slice(left + trim, left + trim + side)
                goal, below = self.target[:, rows, columns], under[:, rows, columns]
                drawn = below * keep
                drawn += rgb
                if covered:
                    above = over[:, rows, columns]
                    drawn *= 1 - above[3]
                    drawn += above[:3]
                    below = below * (1 - above[3]) + above[:3]
                drawn -= goal
                alone = goal - below
                alone = np.minimum((alone * alone).sum(0), TRUNCATE)
                gain[i, j] = alone.sum() - self._truncated(drawn)
                before[i, j] = (alone * solid).sum((-1, -2))
        return gain, before

    def starts(self, detection, layers):
        """The best pose of each style near a detection by an untruncated half-size match.

        Drawn between layers, a sprite changes the picture by w D, with w = 1 - alpha of what lies
        over it and D = rgb - alpha * under. The gain 2 w <r, D> - w^2 |D|^2 (r: what the layers
        leave) is linear in products of the sprite's channels: all poses are one matrix product.
        """
        sprites, side = self.sprites, self.sprites.side // 2
        matrix = sprites.of(detection.concept)[1]
        under, over = layers
        w = 1 - over[3]
        rest = w * (self.target - under * w - over[:3])
        under = under * w
        maps = [2 * rest, -2 * (rest * layers[0]).sum(0)[None], -(w * w)[None]]
        maps += [2 * under * w, -(under * under).sum(0)[None]]
        maps = halve(np.concatenate(maps))
        limit = maps.shape[1] - side, maps.shape[2] - side
        middle = [round(c / 2) for c in (detection.y, detection.x)]
        tops, lefts = (
            np.unique(np.clip(c + np.arange(-2, 3), 0, n))
            for c, n in zip(middle, limit, strict=True)
        )
        windows = [maps[:, t : t + side, u : u + side].ravel() for t in tops for u in lefts]
        gain = np.stack(windows) @ matrix.T
        gain = gain.reshape(len(windows), len(sprites.world.styles), -1)
        poses = []
        for s in range(gain.shape[1]):
            at, extent = np.unravel_index(gain[:, s].argmax(), gain[:, s].shape)
            top, left = tops[at // len(lefts)], lefts[at % len(lefts)]
            poses.append(Pose(detection.concept, s, int(extent), 2 * int(top), 2 * int(left)))
        scored = [(self.gain_of(p, layers)[0], p) for p in poses]
        return sorted(scored, key=lambda pair: -pair[0])

    def gain_of(self, pose, layers):
        """(gain, before) of one pose."""
        gain, before = self.gains(
            pose.concept, [pose.style], [pose.extent], [pose.top], [pose.left], layers
        )
        return float(gain.item()), float(before.item())

    def best(self, pose, layers, styles, reach=1, stride=1, grow=1):
        """(pose, gain, before) of the best pose around one."""
        limit = self.target.shape[1] - self.sprites.side, self.target.shape[2] - self.sprites.side
        steps = stride * np.arange(-reach, reach + 1)
        tops, lefts = (
            np.unique(np.clip(c + steps, 0, n))
            for c, n in zip((pose.top, pose.left), limit, strict=True)
        )
        last = len(self.sprites.extents) - 1
        extents = np.unique(np.clip(pose.extent + stride * np.arange(-grow, grow + 1), 0, last))
        gain, before = self.gains(pose.concept, styles, extents, tops, lefts, layers)
        i, j, s, e = np.unravel_index(gain.argmax(), gain.shape)
        found = Pose(pose.concept, styles[s], int(extents[e]), int(tops[i]), int(lefts[j]))
        return found, float(gain[i, j, s, e]), float(before[i, j, s, e])

    def refine(self, pose, layers, rounds=4):
        """Hill climbing over place, extent and, once these rest, style."""
        every = list(range(len(self.sprites.world.styles)))
        for _ in range(rounds):
            moved, _, _ = self.best(pose, layers, [pose.style])
            if moved == pose:
                break
            pose = moved
        better, gain, before = self.best(pose, layers, every, reach=1, grow=1)
        if better.style != pose.style:
            for _ in range(rounds):
                moved, gain, before = self.best(better, layers, [better.style])
                if moved == better:
                    break
                better = moved
        return better, gain, before
