"""Drawing the rows: pipelines as generators, kept pictures, and what the pictures are made of."""

import functools
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np

from cnxs_jax.errors import CheckpointError
from cnxs_jax.pipelines.images import to_uint8


def pipeline_generator(pipelines, guidance_scale=None, batch_size=64):
    """`generate(row, captions, seeds)` over pipelines.

    Args:
        pipelines: {"teacher": pipe, "student": pipe}, from `cnxs_jax.load_pipeline`.
        guidance_scale: of guided rows; None is the pipeline's own default.
        batch_size: pictures a call; short batches are padded, so that one shape compiles.
    """

    def generate(row, captions, seeds):
        pipe = pipelines[row.model]
        pipe = pipe.replace(scheduler=row.scheduler) if row.scheduler else pipe
        out = []
        for start in range(0, len(captions), batch_size):
            texts = list(captions[start : start + batch_size])
            spots = list(seeds[start : start + batch_size])
            missing = batch_size - len(texts)
            result = pipe(
                texts + texts[-1:] * missing,
                num_inference_steps=row.steps,
                guidance_scale=guidance_scale if row.guided else 0.0,
                seed=spots + spots[-1:] * missing,
                output_type="np",
            )
            out.append(to_uint8(result.images[: len(texts)]))
        return np.concatenate(out)

    return generate


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


def cached(generate, directory, identity, seed=0, log=print):
    """`make(row, prompts)` that keeps each row's pictures of each split in `directory`.

    A file made by other weights, prompts or seeds is drawn again: `identity` and the prompts are
    part of its fingerprint. Noise of prompt n is image n of `seed` in every row.
    """
    directory = Path(directory)

    def make(row, prompts):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{row.slug}_{prompts.split}.npz"
        key = json.dumps([identity, repr(row), prompts.captions, seed])
        print_ = hashlib.sha256(key.encode()).hexdigest()
        images = _read_pictures(path, print_)
        if images is None:
            log(f"{row.method}, {row.steps} steps: {len(prompts.captions)} pictures")
            seeds = [(seed, n) for n in range(len(prompts.captions))]
            images = generate(row, prompts.captions, seeds)
            temporary = path.with_name(f".{path.name}.tmp{os.getpid()}.npz")
            np.savez(temporary, images=images, fingerprint=np.array(print_))
            temporary.replace(path)
        return images

    return make


def _read_pictures(path, fingerprint):
    try:
        with np.load(path, allow_pickle=False) as data:
            return data["images"] if str(data["fingerprint"]) == fingerprint else None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def identity(directory):
    """Hash of a pipeline directory: every file's name and content."""
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    if not (directory / "model_index.json").is_file():
        raise CheckpointError(
            "no pipeline there (no model_index.json)",
            directory,
            "give a diffusers pipeline directory, or --workdir of a finished training run",
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(directory)).encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
