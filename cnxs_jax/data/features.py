"""Cached features: what the frozen encoders make of pictures and captions, on disk.

    features-00000-of-00002.array_record     one example a record
    features-00000-of-00002.index.npy        int64 [N,3]: its number, original height and width
    features-00000-of-00002.json             the manifest, written last

A record holds the moments of the VAE's posterior (`mean`, `logvar` [h,w,C]; with a control picture
`hint_mean`, `hint_logvar`), the valid tokens of the text alone (`text` [n,D]), `size`, `aspect` and
the caption. The manifest says which encoders and which data they came from; features of others are
refused. `python -m train.cache` writes them.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from cnxs_jax.errors import DataError
from cnxs_jax.storage import replacing, write_json

FORMAT = 1
PADDED = ("text",)  # cut to their valid tokens on disk
WEIGHTS = (".safetensors", ".bin", ".pth", ".json", ".model", ".txt")  # the last two: tokenizers'
AGAIN = "write the cache anew with `python -m train.cache`, or use the encoders and settings it has"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a cache; it has the examples index, index + count, ..."""

    index: int
    count: int

    @property
    def name(self):
        return f"features-{self.index:05d}-of-{self.count:05d}"


def weights_hash(directory):
    """sha256 of a component's weight and config files, read once and never loaded.

    Raises DataError for a directory without files.
    """
    directory = pathlib.Path(directory)
    found = sorted(p for p in directory.glob("*") if p.suffix in WEIGHTS and p.is_file())
    if not found:
        raise DataError("no weights whose hash could be taken", str(directory))
    total = hashlib.sha256()
    for path in found:
        with open(path, "rb") as file:
            total.update(
                f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()


def write(root, shard, examples, manifest):
    """Writes one shard, whole or not at all.

    Args:
        root: the cache's directory; made if it is not there.
        shard: a `Shard`.
        examples: an iterable of (number, (height, width) of the original, record).
        manifest: JSON-able, without the keys that are added here.

    Returns the number of records.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from flax import serialization

    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    stem, index = root / shard.name, []
    part = stem.with_suffix(".part")  # large: what a killed run left is written over
    # One record a group: training reads them in any order.
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for number, (height, width), record in examples:
        writer.write(serialization.msgpack_serialize(record))
        index.append((number, height, width))
    writer.close()
    part.replace(stem.with_suffix(".array_record"))
    np.save(stem.with_suffix(".index.npy"), np.array(index, np.int64).reshape(-1, 3))
    own = {"format": FORMAT, "shard": shard.index, "shards": shard.count, "records": len(index)}
    write_json(stem.with_suffix(".json"), {**manifest, **own})
    return len(index)


def read_manifest(path):
    """A shard's manifest. Raises DataError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"the manifest cannot be read: {error}", str(path), AGAIN) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"no manifest of format {FORMAT}", str(path), AGAIN)
    return found


def identity(manifest):
    """What all shards of one cache have in common."""
    return {k: v for k, v in manifest.items() if k not in ("shard", "records")}


class FeatureSource:
    """An indexable source of cached features: `source[i] -> {"mean", "logvar", "text", ...}`.

    Arrays are float32; `text` [L,D] is padded with zeros to the cache's `max_length` and comes with
    `text_mask` int32 [L]. `keys` are the arrays of an example.

    Raises:
        DataError: no cache, missing or disagreeing shards, damaged records.
    """

    def __init__(self, root):
        self.root = pathlib.Path(root).expanduser()
        self.manifest = self._manifest()
        shards = [Shard(i, self.manifest["shards"]) for i in range(self.manifest["shards"])]
        index = [np.load((self.root / s.name).with_suffix(".index.npy")) for s in shards]
        self._files = [str((self.root / s.name).with_suffix(".array_record")) for s in shards]
        rows = np.concatenate(index)
        shard_of = np.repeat(np.arange(len(index)), [len(part) for part in index])
        row_of = np.concatenate([np.arange(len(part)) for part in index])
        order = np.argsort(rows[:, 0], kind="stable")
        if not np.array_equal(rows[order, 0], np.arange(self.manifest["examples"])):
            what = f"{len(rows)} records of {self.manifest['examples']} examples"
            raise DataError(f"examples are missing or doubled: {what}", str(self.root), AGAIN)
        self._place = np.stack([shard_of, row_of], axis=1)[order]
        self._sizes = rows[order, 1:].astype(np.int32)
        self._readers = {}

    def _manifest(self):
        paths = sorted(self.root.glob("features-*-of-*.json"))
        if not paths:
            fix = "data.root: the --out of `python -m train.cache`"
            raise DataError("no cached features in this directory", str(self.root), fix)
        found = [read_manifest(path) for path in paths]
        first = identity(found[0])
        for path, other in zip(paths, found, strict=True):
            differ = differences(first, identity(other))
            if differ:
                what = f"{paths[0].name} and {path.name} are of different caches ({differ})"
                raise DataError(what, str(self.root), AGAIN)
        missing = set(range(first["shards"])) - {m["shard"] for m in found}
        if missing:
            what = f"{len(missing)} of {first['shards']} shards are missing, first {min(missing)}"
            fix = f"python -m train.cache --shard={min(missing)}/{first['shards']} ..."
            raise DataError(what, str(self.root), fix)
        return first

    @property
    def keys(self):
        """The arrays of an example."""
        return tuple(self.manifest["arrays"])

    def __len__(self):
        return len(self._place)

    def __repr__(self):
        text = json.dumps(self.manifest, sort_keys=True).encode()
        return f"FeatureSource({len(self)} examples, {hashlib.sha256(text).hexdigest()[:16]})"

    def __getitem__(self, index):
        from flax import serialization

        shard, row = (int(n) for n in self._place[int(index)])
        try:
            record = serialization.msgpack_restore(self._reader(shard)[row])
        except Exception as error:  # whatever ArrayRecord and msgpack raise
            raise DataError(
                f"record {row} is damaged: {error}", self._files[shard], AGAIN
            ) from None
        caption = record.pop("caption")
        example = {key: np.asarray(value, np.float32) for key, value in record.items()}
        for key in PADDED:
            example[key], example[f"{key}_mask"] = padded(example[key], self.manifest["max_length"])
        return {**example, "caption": caption}

    def _reader(self, shard):
        if shard not in self._readers:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._readers[shard] = ArrayRecordDataSource(self._files[shard])
        return self._readers[shard]

    def read(self, index, height, width):
        """Example `index`, which was encoded in this size, px."""
        return self[index]

    def original_sizes(self):
        """(height, width) of the original pictures, int32 [N,2]."""
        return self._sizes

    def check(self, expected, where="config.data"):
        """Raises DataError unless the manifest has all of `expected`, {name: value}."""
        differ = differences({k: self.manifest.get(k) for k in expected}, expected)
        if differ:
            raise DataError(
                f"the cached features are stale: {differ} [{where}]", str(self.root), AGAIN
            )


def differences(before, now):
    """`name: cached A, now B` of what differs in two tables and in tables inside of them."""
    texts = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            texts.append(differences(*({f"{key}.{k}": v for k, v in x.items()} for x in (a, b))))
        else:
            texts.append(f"{key}: cached {short(a)}, now {short(b)}")
    return ", ".join(texts)


def short(value):
    """A value in a message; hashes by their beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def padded(tokens, length):
    """`(tokens [L,D] with zeros behind, mask int32 [L])`."""
    out = np.zeros((length, tokens.shape[1]), np.float32)
    out[: len(tokens)] = tokens
    return out, (np.arange(length) < len(tokens)).astype(np.int32)


EMPTY = "empty.npy"


def write_empty(root, text):
    """The empty prompt's valid tokens [n,D], which guidance and caption dropout need."""
    with replacing(pathlib.Path(root) / EMPTY) as part, part.open("wb") as file:
        np.save(file, np.asarray(text, np.float32))


def read_empty(source):
    """`(text [L,D], mask [L])` of the empty prompt. Raises DataError."""
    path = source.root / EMPTY
    if not path.is_file():
        raise DataError("the empty prompt's features are missing", str(path), AGAIN)
    return padded(np.load(path), source.manifest["max_length"])
