r"""`python -m train.cache`: encodes pictures and captions once, for runs that read the features.

  python -m train.cache --config=configs/pixart_lcm.py:xl_512 --out=features --shard=0/8 \
      --config.data.source=image_folder --config.data.root=photos
  python -m train --config=configs/pixart_lcm.py:xl_512 --workdir=runs/lcm \
      --config.data.source=features --config.data.root=features

Every shard is a command of its own, on any machine, in any order. What is stored, and what makes a
cache stale: `cnxs_jax/data/features.py`. The first command loads the pipeline's VAE and text
encoder, the second one reads only the hash of their files.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from cnxs_jax import errors

ELSEWHERE = ("root", "prefetch")  # settings that may differ from machine to machine
TOO_MANY = 5_000_000  # the embedded worlds are endless


def define_flags():
    """The command line; not at import, since other commands have flags of these names."""
    config_flags.DEFINE_config_file("config", None, "The recipe whose data is encoded.")
    flags.DEFINE_string("out", None, "Directory of the cache.")
    flags.DEFINE_string("shard", "0/1", "i/n: examples i, i + n, i + 2n, ... of the data.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the stored features.")
    flags.DEFINE_integer("batch_size", 8, "Pictures encoded at once.", lower_bound=1)


def parse_shard(text):
    """`Shard` of "i/n". Raises ConfigError."""
    from cnxs_jax.data.features import Shard

    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        fix = "write i/n with 0 <= i < n, such as 0/8"
        raise errors.ConfigError(f"{text!r} is no shard", "--shard", fix)
    return Shard(int(index), int(count))


def shapes_of(source, config):
    """`[(height, width), ...]` of every example, px: its bucket's, or all the same."""
    from cnxs_jax.data import buckets

    side = config.data.size
    if not config.data.get("buckets"):
        return [(side, side)] * len(source)
    table = buckets.table(side)
    nearest = buckets.assign(source.original_sizes(), tuple(table))
    return [tuple(table.values())[i] for i in nearest]


def groups(numbers, shapes, size):
    """Lists of at most `size` numbers whose examples have one shape."""
    waiting = {}
    for number in numbers:
        queue = waiting.setdefault(shapes[number], [])
        queue.append(number)
        if len(queue) == size:
            yield waiting.pop(shapes[number])
    yield from waiting.values()


def raw_batch(examples, config, tokenizer, arrays, shape):
    """Stacked arrays and tokens of examples, as the loaders give them."""
    import numpy as np

    from train import inputs

    raw = {key: np.stack([e[key] for e in examples]) for key in arrays}
    raw |= inputs.tokens(config, tokenizer, [e["caption"] for e in examples])
    if config.data.get("buckets"):
        raw["original_size"] = np.stack([e["original_size"] for e in examples])
        ratio = round(shape[0] / shape[1], 2)
        raw["aspect"] = np.full((len(examples), 1), ratio, np.float32)
    return raw


def records(config, recipe, nets, encoders, tokenizer, source, shard, batch_size, dtype):
    """Yields (number, original (height, width), record) of a shard's examples."""
    import jax
    import numpy as np

    from train import features

    extract = jax.jit(lambda encoders, raw: features.extract(nets, encoders, raw, recipe.hint))
    shapes = shapes_of(source, config)
    numbers = range(shard.index, len(source), shard.count)
    for group in groups(numbers, shapes, batch_size):
        shape = shapes[group[0]]
        full = (group + group[-1:] * batch_size)[:batch_size]  # one program a shape
        read = getattr(source, "read", None)
        found = {n: source[n] if read is None else read(n, *shape) for n in group}
        raw = raw_batch([found[n] for n in full], config, tokenizer, recipe.arrays, shape)
        given = jax.device_get(extract(encoders, raw))
        for row, number in enumerate(group):
            length = int(given["text_mask"][row].sum())
            record = {k: np.asarray(v[row]) for k, v in given.items() if k != "text_mask"}
            record["text"] = record["text"][:length]
            record = {k: v.astype(dtype) if k not in ("size", "aspect") else v
                      for k, v in record.items()}  # fmt: skip
            example = found[number]
            original = example.get("original_size", np.array(shape))
            yield number, original, {**record, "caption": example["caption"]}


def write(config, out, shard, dtype="float32", batch_size=8):
    """Writes one shard of the features of `config`'s data into `out`.

    Returns its number of records; 0 if it was there already.

    Raises ConfigError, DataError: a task without frozen encoders, data without an end, features of
    other settings in `out`.
    """
    import jax
    import jax.numpy as jnp

    from cnxs_jax.data import features as stored
    from cnxs_jax.data import text as texts
    from train import features, inputs, networks
    from train.workdir import plain

    recipe = networks.recipe_of(config)
    if not recipe.cacheable:
        what = "the features of this task cannot be stored"
        raise errors.ConfigError(what, "config.task", "train on the pictures")
    path = config[recipe.path]
    source = inputs.open_source(config, truth=inputs.wants_truth(recipe.arrays))
    if len(source) > TOO_MANY:
        what = f"{len(source):,} examples are too many to store"
        raise errors.ConfigError(what, "config.data.num_examples", "set it, e.g. to 20000")
    manifest = {
        **networks.cache_settings(config, path, recipe.hint),
        "source": repr(source),
        "data": {k: v for k, v in plain(config.data).items() if k not in ELSEWHERE},
        "examples": len(source),
        "shards": shard.count,
        "stored": dtype,
    }
    if done(out, shard, manifest):
        return 0
    nets = networks.load_encoders(config, path)
    tokenizer = texts.load_tokenizer(f"{path}/tokenizer")
    # On the device once, not with every batch.
    encoders = jax.device_put({"vae": nets.vae_params, "text_encoder": nets.text_params})
    ids = inputs.tokens(config, tokenizer, [""])
    empty = jax.device_get(jax.jit(lambda e: features.empty_text(nets, e, ids))(encoders))
    stored.write_empty(out, empty["text"][0][: int(empty["text_mask"].sum())])
    arrays = ["aspect", "logvar", "mean", "size", "text", "text_mask"]
    if recipe.hint is not None:
        arrays += ["hint_logvar", "hint_mean"]
    opened = recipe, nets, encoders, tokenizer, source
    made = records(config, *opened, shard, batch_size, jnp.dtype(dtype))
    return stored.write(out, shard, made, {**manifest, "arrays": sorted(arrays)})


def done(out, shard, manifest):
    """Whether this shard is in `out` already. Raises DataError where `out` has other features."""
    from cnxs_jax.data import features as stored

    for path in sorted(pathlib.Path(out).glob("features-*.json")):
        found = stored.read_manifest(path)
        differ = stored.differences({k: found.get(k) for k in manifest}, manifest)
        if differ:
            fix = "choose another --out, or delete this one"
            raise errors.DataError(f"features of other settings ({differ})", str(path), fix)
        if found["shard"] == shard.index:
            return True
    return False


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    from train import validate
    from train.workdir import expand

    args = flags.FLAGS
    shard = parse_shard(args.shard)
    validate.check(args.config)
    number = write(expand(args.config, "."), args.out, shard, args.dtype, args.batch_size)
    print(f"{shard.name}: {number} examples" if number else f"{shard.name}: written before")
    return 0


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["config", "out"])
    errors.run_app(main)
