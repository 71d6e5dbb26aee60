"""The task `style_words`: reference pictures as words of a text encoder (`models.style_words`).

No denoiser runs: what the encoder makes of a caption with the pseudo-words shall be what it makes
of it with the words that name the style, and then any denoiser that reads it draws that style.
"""

import jax.numpy as jnp
import numpy as np

from cnxs_jax.data import caption_cleaning, pipeline
from cnxs_jax.data.text import load_tokenizer
from cnxs_jax.errors import ConfigError, DataError
from cnxs_jax.models.conditioning import clip_pixels
from cnxs_jax.models.style_words import StyleWords, placeholders
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.pipelines.load import load_model, save_model
from cnxs_jax.pipelines.style import IMAGE_ENCODER, WORDS, insert
from train import inputs, validate
from train.loop import Task
from train.parts import make


def phrase(value, where):
    """A text with one `{}` for the style."""
    validate.text(value, where)
    if value.count("{}") != 1:
        raise ConfigError(f"{value!r} has not one {{}}", where, 'such as ", {} style"')


KEYS = {
    "style_words": {
        "data": inputs.KEYS,
        "text_path": validate.text,
        "clip_path": validate.text,
        "phrase": phrase,
        "words": {"num_words": validate.integer(1, 64), "hidden_size": validate.integer(1)},
    }
}
SHOWN = 3  # names in an error
FIX = 'name each picture\'s style, in metadata.jsonl as {"style": "watercolor", ...}'


def check(values, where):
    for key in ("buckets", "tokenizer"):
        if values["data"].get(key):
            what = "pictures are cut to CLIP's square, and texts are read as text_path reads them"
            raise ConfigError(what, f"{where}.data.{key}", "leave it out")


CONFLICTS = {"style_words": check}


def style_words(config):
    """Trains a `StyleWords`; exports it with its picture encoder, for `load_pipeline(style=...)`.

    `text_path` has a T5 as `text_encoder` and `tokenizer` (any PixArt pipeline has), `clip_path` a
    CLIP as `clip_image_encoder`.
    """
    text, text_params = load_model(f"{config.text_path}/text_encoder")
    image, image_params = load_model(f"{config.clip_path}/{IMAGE_ENCODER}")
    if not isinstance(text, T5Encoder):
        raise ConfigError(f"a {type(text).__name__} takes no pseudo-words", "config.text_path")
    tokenizer = load_tokenizer(f"{config.text_path}/tokenizer")
    module = make(
        StyleWords,
        {**config.words, "projection_dim": image.projection_dim, "d_model": text.d_model},
    )
    captions = Captions(
        inputs.open_source(config), tokenizer, config.phrase, module.num_words,
        inputs.max_length(config),
    )  # fmt: skip
    loader = pipeline.make_loader(
        captions, batch_size=config.batch_size, seed=config.seed, rows=inputs.rows(config),
        keys=("image", *captions.keys), prefetch=config.data.get("prefetch", 2),
    )  # fmt: skip
    start = named_mean(captions, text_params)

    def encode(encoders, raw, key):
        pixels = clip_pixels(raw["image"].astype(jnp.float32) / 255.0, image.image_size)
        named = text.apply({"params": encoders["text"]}, raw["named"], raw["named_mask"])
        target = jnp.take_along_axis(named, raw["place"][..., None], axis=1)
        embedding = image.apply({"params": encoders["image"]}, pixels)
        cond = {"ids": raw["ids"], "mask": raw["mask"], "target": target}
        return {"x": embedding, "cond": cond}

    def init(key):
        params = module.init(key, jnp.zeros((1, module.projection_dim)))["params"]
        params["linear_2"]["bias"] = jnp.asarray(start)
        return params

    def objective(params, ema, frozen, batch, keys):
        words, cond = module.apply({"params": params}, batch["x"]), batch["cond"]
        out = text.apply({"params": frozen["text"]}, cond["ids"], cond["mask"], words)
        error = jnp.square(out - cond["target"]).mean(-1)
        return (error * cond["mask"]).sum() / cond["mask"].sum(), {}

    def export(ema, frozen, encoders, path):
        save_model(module, ema, path / WORDS)
        save_model(image, encoders["image"], path / IMAGE_ENCODER)

    encoders = {"text": text_params, "image": image_params}
    frozen = {"text": text_params}
    return Task(objective, init, loader, encode, encoders, frozen, export=export)


class Captions:
    """A source whose examples have their captions as ids, twice.

    `ids`, `mask` [L]: the caption with placeholders of pseudo-words before its end. `named`,
    `named_mask` [L]: with the words of the style there. `place` [L]: where in the second each token
    of the first has its like; where words and placeholders differ in number, the nearest part.
    A caption that names the style in these words loses them first; one that is too long its end.

    Raises:
        DataError: pictures of a folder without a style; and when an example is read, others.
    """

    keys = ("ids", "mask", "named", "named_mask", "place")

    def __init__(self, source, tokenizer, phrase, count, length):
        self.source, self.tokenizer, self.phrase = source, tokenizer, phrase
        self.count, self.length = count, length
        entries = getattr(source, "entries", ())[: len(source)]
        bare = [str(e.path) for e in entries if not e.style]
        if bare:
            names = ", ".join(bare[:SHOWN]) + (", ..." if len(bare) > SHOWN else "")
            raise DataError(f"{len(bare)} pictures without a style: {names}", "data.root", FIX)

    def __len__(self):
        return len(self.source)

    def __repr__(self):
        return f"Captions({self.phrase!r}, {self.count}, {self.source!r})"

    def __getitem__(self, index):
        example = self.source[index]
        if not example.get("style"):
            raise DataError("a picture without a style", f"example {index}", FIX)
        return {**example, **self.tokens(example["caption"], example["style"])}

    def tokens(self, caption, style):
        """The arrays of `keys`."""
        phrase = caption_cleaning.clean_caption("a" + self.phrase.replace("{}", style))[1:]
        caption = caption_cleaning.clean_caption(caption).replace(phrase, "")
        words = self.tokenizer("a" + phrase)["input_ids"]
        words = words[len(self.tokenizer("a")["input_ids"]) - 1 : -1]
        room = max(self.count, len(words))
        if not words or room > self.length - 2:
            what = f"{phrase!r} has {len(words)} tokens, texts {self.length}"
            raise DataError(what, "config.phrase", "config.data.max_length")
        ids, mask = caption_cleaning.tokenize(self.tokenizer, caption, self.length - room)
        own, own_mask = insert(ids, mask, placeholders(self.count), self.length)
        named, named_mask = insert(ids, mask, words, self.length)
        before, place = int(mask.sum()) - 1, np.arange(self.length)
        part = np.arange(self.count) * len(words) // self.count
        place[before : before + self.count] = before + part
        place[before + self.count :] = before + len(words)  # the end; padding counts for nothing
        found = (own[0], own_mask[0], named[0], named_mask[0], place.astype(np.int32))
        return dict(zip(self.keys, found, strict=True))


def named_mean(captions, text_params, number=64):
    """Where training starts: the mean of the words that the first examples name their styles by."""
    table = np.asarray(text_params["shared"]["embedding"], np.float32)
    found = []
    for index in range(min(number, len(captions))):
        arrays = captions[index]
        found.append(table[arrays["named"][arrays["place"][arrays["ids"] < 0]]])
    return np.mean(found, axis=0).reshape(-1)
