"""The compositor behind the embedded worlds: caption, picture and exact truth from a seed.

A scene is a plain coloured background, one to three sprites in one style, and a relation between
the first two. Everything that can be asked about the picture is known exactly. The caption always
leaves position and size open, and names background, style and relation only half of the time: a
caption that nearly determines its picture would leave a few-step sampler nothing to blur, and
distillation nothing to show.
"""

import dataclasses
import zlib

import numpy as np

from cnxs_jax import errors
from cnxs_jax.data import layout

RELATIONS = ("left of", "above", "in front of")
SPLITS = ("train", "test", "heldout_pairs", "heldout_relations")
COUNT_PROBABILITIES = (0.4, 0.4, 0.2)  # of 1, 2 and 3 sprites
NAME_PROBABILITY = 0.5  # each of background, style, relation


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The vocabulary of a set of scenes and the pictures behind it.

    Attributes:
        name: the name that `pipeline.open_source` knows it by.
        concepts, styles: words; every pair of them has a sprite.
        backgrounds: word -> RGB triple.
        render: `(concept, style, extent) -> uint8 [h, w, 4]`, alpha-premultiplied, cropped to its
            visible box, longer side = extent px.
    """

    name: str
    concepts: tuple
    styles: tuple
    backgrounds: dict
    render: object
    cache: dict = dataclasses.field(default_factory=dict, repr=False)

    def sprite(self, concept, style, extent):
        """`(premultiplied rgb float32 [h,w,3], alpha float32 [h,w,1], solid bool [h,w])`."""
        key = (concept, style, extent)
        if key not in self.cache:
            rgba = self.render(*key).astype(np.float32)
            alpha = rgba[..., 3:] / 255
            self.cache[key] = (rgba[..., :3], alpha, alpha[..., 0] >= 0.5)
        return self.cache[key]

    def sprite_of(self, obj):
        """The sprite of a scene's object."""
        return self.sprite(obj["concept"], obj["style"], obj["extent"])

    def solid(self, obj):
        """The pixels that count as the object (alpha >= 1/2), bool [h, w]."""
        return self.sprite_of(obj)[2]

    def heldout_pairs(self):
        """(concept, style) pairs that `train` and `test` never show: each second concept, once."""
        every = enumerate(self.concepts[::2])
        return frozenset((c, self.styles[i % len(self.styles)]) for i, c in every)


def is_heldout_relation(first, relation, second):
    """True for the tenth of the (A, relation, B) triples that only `heldout_relations` shows."""
    return zlib.crc32(f"{first}|{relation}|{second}".encode()) % 10 == 0


def scene_rng(world_name, split, index, seed=0):
    """The generator of scene `index` of a split; independent over all four arguments."""
    return np.random.default_rng([zlib.crc32(f"{world_name}/{split}".encode()), seed, index])


def make_scene(world, rng, spec=None, *, size=64, split="train", truth=True):
    """Draws one scene.

    Args:
        world: a `World`.
        rng: a numpy Generator, or an int seed.
        spec: facts to force, a dict with any of `concepts` (list; the relation is between the
            first two), `count` (of sprites), `style`, `background`, `relation` (None: free),
            `named` (a set of "background", "style", "relation": exactly what the caption shall
            name).
        size: side of the square picture in px.
        split: which (concept, style) pairs and (A, relation, B) triples may occur; a pair or
            triple that `spec` forces whole is taken as it is.
        truth: also compute `masks`, `edges`, `depth` and `concept_map`.

    Returns:
        A dict: `image` uint8 [size,size,3]; `caption`; `objects`, a list of {concept, style, box
        (x0, y0, x1, y1 in px, exclusive ends), extent (longer side, px), depth (1 = farthest),
        visible (fraction)}; `background`, `style`, `relation` ((A, relation, B), or None for one
        object): what the picture shows; `prompt`: what the caption says, {concepts, background,
        style, relation}, None where it is silent. With `truth`: `masks` bool [n,size,size], the
        visible pixels of each object (alpha >= 1/2); `depth` uint8 [size,size], 0 = background,
        larger = nearer; `edges` bool [size,size], pixels whose right or lower neighbour belongs to
        another instance or to the background (drawn on the upper or left side of the border);
        `concept_map` uint8 [size,size], 1 + the visible concept's index in the world, 0 background.

    Raises:
        errors.ConfigError: unknown split, unknown word in `spec`, or facts the split cannot have.
    """
    if split not in SPLITS:
        fix = f"use one of {SPLITS}" + errors.did_you_mean(split, SPLITS)
        raise errors.ConfigError(f"unknown split {split!r}", "split", fix)
    if not isinstance(rng, np.random.Generator):
        rng = scene_rng(world.name, split, int(rng))
    facts = draw_facts(world, rng, spec or {}, split)
    objects, order = layout.draw_layout(world, rng, facts, size)
    label, image = composite(world, objects, order, facts["background"], size)
    scene = {
        "image": image,
        "caption": write_caption(facts["prompt"], rng),
        "objects": objects,
        **{k: facts[k] for k in ("background", "style", "relation", "prompt")},
    }
    solid = [world.solid(o).sum() for o in objects]
    for i, o in enumerate(objects):
        o["visible"] = float((label == i + 1).sum() / solid[i])
    if truth:
        scene.update(exact_truth(world, label, objects))
    return scene


def draw_facts(world, rng, spec, split):
    """Concepts, style, background, relation, and which of them the caption names."""
    check_spec(world, spec)
    held = world.heldout_pairs()
    for _ in range(1000):
        concepts, style = _draw_concepts(world, rng, spec, split, held)
        relation = None
        if len(concepts) > 1:
            kind = spec.get("relation") or RELATIONS[rng.integers(3)]
            relation = (concepts[0], kind, concepts[1])
        if _allowed(concepts, style, relation, spec, split, held):
            break
    else:
        fix = "force fewer facts or use another split"
        raise errors.ConfigError(f"no scene of split {split!r} has {spec}", "spec", fix)
    background = (
        spec.get("background") or list(world.backgrounds)[rng.integers(len(world.backgrounds))]
    )
    shown = {"background": background, "style": style, "relation": relation}
    named = {k for k in shown if rng.random() < NAME_PROBABILITY}
    named |= {"heldout_pairs": {"style"}, "heldout_relations": {"relation"}}.get(split, set())
    named = spec.get("named", named)
    prompt = {k: v if k in named else None for k, v in shown.items()}
    listed = list(concepts)
    if not prompt["relation"] and "concepts" not in spec:
        rng.shuffle(listed)  # so that the order of the words says nothing about the layout
    return {**shown, "concepts": concepts, "prompt": {"concepts": listed, **prompt}}


def check_spec(world, spec):
    """Raises ConfigError where `spec` has an unknown key or word."""
    words = {
        "concepts": world.concepts,
        "count": (1, 2, 3),
        "style": world.styles,
        "background": tuple(world.backgrounds),
        "relation": RELATIONS,
        "named": ("background", "style", "relation"),
    }
    for key, value in spec.items():
        if key not in words:
            hint = f"use {tuple(words)}" + errors.did_you_mean(key, words)
            raise errors.ConfigError(f"unknown key {key!r}", "spec", hint)
        for word in value if key in ("concepts", "named") else [value]:
            if word is not None and word not in words[key]:
                hint = f"use one of {words[key]}" + errors.did_you_mean(word, words[key])
                raise errors.ConfigError(f"unknown {key} {word!r}", "spec", hint)
    if "concepts" in spec and not 1 <= len(spec["concepts"]) <= 3:
        raise errors.ConfigError(f"{len(spec['concepts'])} concepts", "spec", "give 1 to 3")


def _draw_concepts(world, rng, spec, split, held):
    style = spec.get("style") or world.styles[rng.integers(len(world.styles))]
    if "concepts" in spec:
        return list(spec["concepts"]), style
    count = spec.get("count") or 1 + int(rng.choice(3, p=COUNT_PROBABILITIES))
    if split == "heldout_relations":
        count = max(count, 2)
    picked = [world.concepts[i] for i in rng.choice(len(world.concepts), count, replace=False)]
    if split == "heldout_pairs":  # exactly one held-out pair, anywhere in the list
        pool = sorted(p for p in held if "style" not in spec or p[1] == style)
        concept, style = pool[rng.integers(len(pool))]
        if concept not in picked:
            picked[rng.integers(count)] = concept
    return picked, style


def _allowed(concepts, style, relation, spec, split, held):
    """Whether the split may show these facts. Facts that `spec` forces whole always pass."""
    pairs = sum((c, style) in held for c in concepts)
    forced = "concepts" in spec and "style" in spec
    if not forced and pairs != (1 if split == "heldout_pairs" else 0):
        return False
    if relation and ("concepts" not in spec or "relation" not in spec):
        return is_heldout_relation(*relation) == (split == "heldout_relations")
    return True


def composite(world, objects, order, background, size):
    """Paints back to front. Returns `(label uint8 [size,size], image uint8 [size,size,3])`.

    `label` is 1 + the index of the visible object, 0 for background. Colours are blended in
    float32 and rounded once.
    """
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = world.backgrounds[background]
    label = np.zeros((size, size), np.uint8)
    for i in order:
        rgb, alpha, solid = world.sprite_of(objects[i])
        x0, y0, x1, y1 = objects[i]["box"]
        part = canvas[y0:y1, x0:x1]
        part *= 1 - alpha
        part += rgb
        label[y0:y1, x0:x1][solid] = i + 1
    return label, np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def exact_truth(world, label, objects):
    """`masks`, `depth`, `edges` and `concept_map` from the label map (see `make_scene`)."""
    ranks = np.array([0] + [o["depth"] for o in objects], np.uint8)
    names = np.array([0] + [1 + world.concepts.index(o["concept"]) for o in objects], np.uint8)
    edges = np.zeros(label.shape, bool)
    edges[:, :-1] |= label[:, :-1] != label[:, 1:]
    edges[:-1] |= label[:-1] != label[1:]
    masks = np.stack([label == i + 1 for i in range(len(objects))])
    return {
        "masks": masks,
        "depth": ranks[label],
        "edges": edges,
        "concept_map": names[label],
    }


def with_article(noun):
    """`a tiger`, `an octopus`, `a unicorn`."""
    vowel = noun[0] in "aeio" or (noun[0] == "u" and not noun.startswith("uni"))
    return f"{'an' if vowel else 'a'} {noun}"


def write_caption(prompt, rng):
    """One short English phrase that says what `prompt` says and nothing else."""
    nouns = [with_article(c) for c in prompt["concepts"]]
    if prompt["relation"]:
        text = f"{nouns[0]} {prompt['relation'][1]} {nouns[1]}"
        text += f", with {nouns[2]}" if len(nouns) == 3 else ""
    else:
        text = " and ".join([", ".join(nouns[:-1])] * (len(nouns) > 1) + nouns[-1:])
    parts = [f", {prompt['style']} style"] if prompt["style"] else []
    if prompt["background"]:
        parts.append(f" on a {prompt['background']} background")
    if len(parts) == 2 and rng.random() < 0.5:
        parts.reverse()
    return text + "".join(parts)


class SceneSource:
    """Scenes by index, for grain and for plain loops: `source[i]`, any `i >= 0`.

    Args:
        world: a `World`.
        split: one of `SPLITS`.
        size: picture side, px.
        truth: also give masks, edges and depth.
        seed: another seed is another set of scenes.
        length: what `len` says (one epoch of a shuffled loader).
        relations: share of the scenes that have two sprites at least and a caption that names
            their relation; the others are drawn as ever.
    """

    def __init__(self, world, split="train", size=64, truth=False, seed=0, length=10_000_000,
                 relations=0.0):  # fmt: skip
        if split not in SPLITS:
            fix = f"use one of {SPLITS}" + errors.did_you_mean(split, SPLITS)
            raise errors.ConfigError(f"unknown split {split!r}", "split", fix)
        self.world, self.split, self.size, self.truth = world, split, size, truth
        self.seed, self.length, self.relations = seed, length, relations

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = scene_rng(self.world.name, self.split, int(index), self.seed)
        spec = self._related(rng) if self.relations and rng.random() < self.relations else None
        options = {"size": self.size, "split": self.split, "truth": self.truth}
        return {**make_scene(self.world, rng, spec, **options), "index": int(index)}

    @staticmethod
    def _related(rng):
        named = {k for k in ("background", "style") if rng.random() < NAME_PROBABILITY}
        return {"count": int(rng.integers(2, 4)), "named": {"relation"} | named}

    def __repr__(self):  # grain compares this when it restores a checkpoint
        more = f", relations={self.relations}" if self.relations else ""
        name, split = self.world.name, self.split
        return f"SceneSource({name}, {split}, size={self.size}, seed={self.seed}{more})"
