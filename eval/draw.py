"""Drawing the rows: pipelines as generators, kept pictures, and what the pictures are made of."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines.cascade import neighbour
from cnxs_jax.pipelines.images import to_uint8
from cnxs_jax.pipelines.scheduler import read_json
from cnxs_jax.storage import replacing

NOTE = "cnxs_jax"  # the PNG text that says what a picture was made with


def pipeline_generator(pipelines, guidance_scale=None, batch_size=64):
    """`generate(row, captions, seeds, hints=None)` over pipelines.

    Args:
        pipelines: {"teacher": pipe, "student": pipe}, from `cnxs_jax.load_pipeline`. One that has
            controllers is given the hints, control pictures uint8 `[N, H, W, 3]`.
        guidance_scale: of guided rows that have none of their own, and of students that take it
            as an input; None: the pipeline's default.
        batch_size: pictures a call; short batches are padded, so that one shape compiles.
    """

    def generate(row, captions, seeds, hints=None):
        pipe = pipelines[row.model]
        pipe = pipe.replace(scheduler=row.scheduler) if row.scheduler else pipe
        scale = guidance_scale if row.guidance_scale is None else row.guidance_scale
        guided = row.guided or pipe.guidance_is_input
        out, control = [], {}
        for start in range(0, len(captions), batch_size):
            texts = list(captions[start : start + batch_size])
            spots = list(seeds[start : start + batch_size])
            missing = batch_size - len(texts)
            if hints is not None and pipe.controllers:
                own = hints[start : start + batch_size]
                control["image"] = np.concatenate([own, own[-1:].repeat(missing, 0)])
            result = pipe(
                texts + texts[-1:] * missing,
                num_inference_steps=row.steps,
                guidance_scale=scale if guided else 0.0,
                seed=spots + spots[-1:] * missing,
                output_type="np",
                **control,
            )
            out.append(to_uint8(result.images[: len(texts)]))
        return np.concatenate(out)

    return generate


def local_mesh():
    """All devices of this process on the `data` axis, or None for one: hosts share no pictures."""
    from cnxs_jax import sharding

    devices = jax.local_devices()
    return sharding.make_mesh(devices=devices) if len(devices) > 1 else None


@functools.partial(jax.jit, static_argnames="module")
def _round_trip(module, params, images):
    mean, _ = module.apply({"params": params}, images, method="encode")
    return module.apply({"params": params}, mean, method="decode")


def round_trip(module, params, batch_size=64):
    """`f(uint8 images) -> uint8 images`: through a VAE, the ceiling of its pipeline's samples."""

    def through(images):
        out = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].astype(np.float32) / 127.5 - 1
            out.append(to_uint8(np.asarray(_round_trip(module, params, batch)) / 2 + 0.5))
        return np.concatenate(out)

    return through


class Gallery:
    """The pictures of every row, each drawn once: DIRECTORY/<row>/<split>/000000.png.

    `gallery(row, prompts) -> uint8 [N, H, W, 3]` draws what is missing. Every PNG says in a text
    field what it was made with; one that was made with other settings is refused, so that no
    figure mixes two settings. Noise of prompt n is image n of `seed` in every row.

    Args:
        generate: `generate(row, captions, seeds) -> uint8 images`.
        directory: made if missing.
        settings: {name: value}, JSON-able, what all rows share; a value that is a dict by the
            rows' models ({"pipeline": {"teacher": digest, ...}}) counts for its own rows only.
        seed: of the noise.
        batch_size: pictures between two writes.
        redraw: draw pictures of other settings again, instead of refusing them.
    """

    def __init__(self, generate, directory, settings, seed=0, batch_size=64, redraw=False,
                 log=print):  # fmt: skip
        self.generate, self.directory, self.settings = generate, Path(directory), settings
        self.seed, self.batch_size, self.redraw, self.log = seed, batch_size, redraw, log

    def __call__(self, row, prompts):
        images = [self._read(row, prompts, n) for n in range(len(prompts.captions))]
        missing = [n for n, image in enumerate(images) if image is None]
        for n, image in self._draw(row, prompts, missing):
            images[n] = image
        return np.stack(images)

    def draw_share(self, row, prompts, index, count):
        """Draws and keeps what is missing of the batches `index`, `index + count`, ..."""
        mine = [n for n in range(len(prompts.captions)) if n // self.batch_size % count == index]
        missing = [n for n in mine if self._read(row, prompts, n) is None]
        for _ in self._draw(row, prompts, missing):
            pass

    def made_with(self, row, prompts, n):
        """What one picture is made with, JSON-able."""
        shared = {
            k: v.get(row.model) if isinstance(v, dict) else v for k, v in self.settings.items()
        }
        own = {k: getattr(row, k) for k in ("scheduler", "guided", "steps")}
        if row.guidance_scale is not None:
            shared["guidance_scale"] = row.guidance_scale
        if prompts.truth:
            own["hint"] = hashlib.sha256(prompts.truth["hint"][n].tobytes()).hexdigest()[:16]
        return {**shared, **own, "prompt": prompts.captions[n], "seed": [self.seed, n]}

    def _draw(self, row, prompts, missing):
        """Pairs (n, picture), kept a batch at a time: a run that is stopped goes on there."""
        if missing:
            self.log(f"{row.slug}, {prompts.split}: {len(missing)} pictures")
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            captions = [prompts.captions[n] for n in batch]
            shown = {"hints": prompts.truth["hint"][batch]} if prompts.truth else {}
            made = self.generate(row, captions, [(self.seed, n) for n in batch], **shown)
            for n, image in zip(batch, made, strict=True):
                self._write(row, prompts, n, image)
                yield n, image

    def _path(self, row, prompts, n):
        return self.directory / row.slug / prompts.split / f"{n:06d}.png"

    def _write(self, row, prompts, n, image):
        from PIL import Image, PngImagePlugin

        path, note = self._path(row, prompts, n), PngImagePlugin.PngInfo()
        note.add_text(NOTE, json.dumps(self.made_with(row, prompts, n)))
        with replacing(path) as part:
            Image.fromarray(image).save(part, format="PNG", pnginfo=note)

    def _read(self, row, prompts, n):
        """A kept picture, None where there is none or a damaged one."""
        from PIL import Image

        path = self._path(row, prompts, n)
        try:
            with Image.open(path) as picture:
                note, image = json.loads(picture.info[NOTE]), np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, KeyError):
            return None
        wanted = json.loads(json.dumps(self.made_with(row, prompts, n)))
        if note == wanted:
            return image
        if self.redraw:
            return None
        keys = [k for k in wanted | note if note.get(k) != wanted.get(k)]
        shown = (f"{k} was {_short(note.get(k))}, is {_short(wanted.get(k))}" for k in keys)
        raise ConfigError(
            f"the pictures there were made with other settings: {'; '.join(shown)}",
            str(path),
            "choose another --out, or draw them again with --redraw",
        )


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def identity(directory):
    """Hash of a pipeline directory: every file's name and content, neighbouring encoders' too."""
    if not (Path(directory) / "model_index.json").is_file():
        raise CheckpointError(
            "no pipeline there (no model_index.json)",
            directory,
            "give a diffusers pipeline directory, or --workdir of a finished training run",
        )
    digest = digest_of(directory)
    beside = read_json(Path(directory) / "model_index.json").get("encoders_beside") or {}
    for encoder, name in sorted(beside.items()) if isinstance(beside, dict) else ():
        place = neighbour(Path(directory), encoder, name)  # refuses what is no neighbour's name
        digest += digest_of(place) if place.is_dir() else ""
    return hashlib.sha256(digest.encode()).hexdigest() if beside else digest


def digest_of(directory):
    """Hash of a directory: every file's name and content."""
    directory, digest = Path(directory), hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(directory)).encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
