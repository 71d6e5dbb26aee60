"""LoRA files of diffusers and PEFT <-> adapter trees (`cnxs_jax.lora`), strictly, both ways.

Written are diffusers' single file (`transformer.<module>.lora_A.weight`, rank and alpha in the
header's metadata) and PEFT's directory (`base_model.model.<module>.lora_A.weight` and
`adapter_config.json`). Read are, beside these, files with `lora.down`/`lora.up` (old diffusers),
`lora_down`/`lora_up` with an `alpha` tensor a module, and kohya's flat `lora_unet_a_b_c` names.

A file may adapt some layers of a stack, each with a rank of its own: the factors are padded with
zeros to the largest rank, which changes nothing.
"""

import collections
import json
import re
from pathlib import Path

import numpy as np

from cnxs_jax import lora, tree
from cnxs_jax.convert import files, rules
from cnxs_jax.convert.rules import Problems
from cnxs_jax.errors import CheckpointError, ConfigError

METADATA = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."
PREFIXES = (PEFT_PREFIX, "transformer.", "unet.", "diffusion_model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FACTOR = re.compile(
    r"(?P<module>.+?)\.(lora_|lora\.)(?P<side>A|B|down|up)(\.default)?\.weight|"
    r"(?P<owner>.+)\.alpha"
)
SIDES = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
# What a PEFT config may ask for that a product of two factors is not.
UNSUPPORTED = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


# --- reading ---------------------------------------------------------------------------------


def load(path, params, table=None):
    """The adapter tree of a LoRA file or PEFT directory.

    Args:
        path: a `.safetensors` or PyTorch file, or a directory with `adapter_config.json`.
        params: the parameters (or shapes) that it adapts.
        table: their family's `rules.Table`.

    Raises CheckpointError for anything that has no place in `params` or is more than LoRA.
    """
    path = Path(path)
    if path.is_dir():
        config = read_json(path / "adapter_config.json")
        found = [path / name for name in PEFT_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"no {' or '.join(PEFT_FILES)}", str(path))
        return from_tensors(files.read_tensors(found[0]), params, table, config, str(found[0]))
    config = {}
    if path.suffix == ".safetensors":
        tensors = files.read_tensors(path)
        config = parse(files.read_metadata(path).get(METADATA, "{}"), path)
    else:
        tensors = files.read_tensors(path)
    return from_tensors(tensors, params, table, config, str(path))


def from_tensors(tensors, params, table=None, config=None, where="LoRA"):
    """The adapter tree of {key: array}; see `load`.

    `config` is PEFT's: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora. A module's own
    `alpha` tensor goes before it; without either alpha is the rank.
    """
    table, problems = table or rules.Table(), Problems(where)
    config = {unprefixed(k): v for k, v in (config or {}).items()}
    check_config(config, where)
    targets = modules_of(params, table)
    flat = {name.replace(".", "_"): name for name in targets}
    found = {}
    for key, array in tensors.items():
        match = FACTOR.fullmatch(key)
        name = match and unprefixed(match["module"] or match["owner"], flat)
        if name not in targets:
            problems.add("unknown tensors", key + rules.near(str(name), list(targets)))
            continue
        part = SIDES[match["side"]] if match["side"] else "alpha"
        if part in found.setdefault(name, {}):
            problems.add("tensors for one place", key)
        found[name][part] = (key, array)
    slots = {}
    for name, parts in found.items():
        path, index, shape = targets[name]
        adapter = one_module(name, parts, shape, config, problems)
        if adapter is not None:
            slots.setdefault(path, {})[index] = adapter
    problems.check()
    if not slots:
        raise CheckpointError("no LoRA tensors", where)
    return tree.unflatten(stacked(slots, params))


def modules_of(params, table):
    """{PyTorch module: (our path, layer or None, shape of its kernel)} of all kernels."""
    found = {}
    for path, leaf in tree.flatten(params).items():
        if path.endswith(lora.KERNEL):
            stack = rules.stack_of(path, table)
            for i, key in enumerate(rules.keys_of(path, leaf.shape, table)):
                shape = leaf.shape[1:] if stack else leaf.shape
                place = (path.removesuffix(lora.KERNEL), i if stack else None, tuple(shape))
                found[key.removesuffix(".weight")] = place
    return found


def unprefixed(name, flat=None):
    """The module's name without what the layouts put before it; flat names become dotted."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for prefix in FLAT_PREFIXES:
        if flat and name.startswith(prefix):
            return flat.get(name.removeprefix(prefix), name)
    return name


def one_module(name, parts, shape, config, problems):
    """`(A [..., i, r], B [r, o], scale)` in float32, or None with the problem noted."""
    missing = [part for part in ("lora_A", "lora_B") if part not in parts]
    if missing:
        problems.add("incomplete pairs", f"{name}: no {missing[0]}")
        return None
    a, b = (oriented(parts[part][1], shape) for part in ("lora_A", "lora_B"))
    b = b[0, 0] if b.ndim == 4 and b.shape[:2] == (1, 1) else b
    rank = a.shape[-1]
    if rank < 1 or a.shape != (*shape[:-1], rank) or b.shape != (rank, shape[-1]):
        got = [parts[part][1].shape for part in ("lora_A", "lora_B")]
        problems.add("wrong shapes", f"{name}: {got[0]} and {got[1]} for a kernel {shape}")
        return None
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        problems.add("tensors with NaN or Inf", name)
    alpha = matched(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", rank))
    if "alpha" in parts:
        if parts["alpha"][1].size != 1:
            problems.add("wrong shapes", f"{parts['alpha'][0]}: expected one number")
            return None
        alpha = float(rules.to_float(parts["alpha"][1]).reshape(()))
    return a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def oriented(array, shape):
    """A factor in our orientation; a 1x1 convolution's where the kernel is linear."""
    array = rules.to_float(array)
    if array.ndim == 4 and len(shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    return rules.from_torch("kernel", array)


def matched(patterns, name, default):
    """PEFT's lookup: the first pattern that is the module's name or, without `^`, its end.

    PEFT reads patterns as regular expressions; names are all that is written in practice, and a
    file must not make us run an expression of its own.
    """
    for pattern, value in patterns.items():
        plain = pattern.replace("\\", "").removesuffix("$")
        whole = plain.startswith("^")
        plain = plain.removeprefix("^")
        if name == plain or not whole and name.endswith("." + plain):
            return value
    return default


def stacked(slots, params):
    """{path: array} with the layers of each stack together, padded to its largest rank."""
    flat, shapes = {}, tree.flatten(params)
    for path, layers in slots.items():
        rank = max(a.shape[-1] for a, _, _ in layers.values())
        padded = {i: pad(adapter, rank) for i, adapter in layers.items()}
        if None in padded:
            parts = padded[None]
        else:
            nothing = [np.zeros_like(part) for part in next(iter(padded.values()))]
            depth = shapes[path + lora.KERNEL].shape[0]
            rows = [padded.get(i, nothing) for i in range(depth)]
            parts = [np.stack(column) for column in zip(*rows, strict=True)]
        for name, part in zip(("lora_A", "lora_B", "scale"), parts, strict=True):
            flat[f"{path}/{name}"] = part
    return flat


def pad(adapter, rank):
    """`[A, B, scale]` with zero columns and rows up to `rank`."""
    a, b, scale = adapter
    more = rank - a.shape[-1]
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
    return [a, np.pad(b, [(0, more), (0, 0)]), np.float32(scale)]


def check_config(config, where):
    """Raises CheckpointError for adapters that are more than a product of two factors."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"a {config['peft_type']} adapter, only LORA is supported", where)
    for key, plain in UNSUPPORTED.items():
        if config.get(key) and config[key] != plain:
            raise CheckpointError(f"{key} = {config[key]!r} is not supported", where)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"alpha_pattern {patterns!r} is no table", where)
    for pattern, value in {"lora_alpha": config.get("lora_alpha", 1), **patterns}.items():
        if type(value) not in (int, float) or re.search(r"[*+?\[\](){}|]", pattern):
            raise CheckpointError(
                f"alpha {value!r} of {pattern!r}: expected a number and a module's name", where
            )


def read_json(file):
    """The table in a JSON file."""
    if not file.is_file():
        raise CheckpointError(f"no {file.name}", str(file.parent))
    return parse(file.read_text(), file)


def parse(text, where):
    """The table that the JSON text is. Raises CheckpointError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError("the LoRA config is no JSON table", str(where))
    return content


# --- writing ---------------------------------------------------------------------------------


def save(adapter, path, table=None, prefix="transformer", dtype=None):
    """Writes an adapter tree.

    Args:
        path: `x.safetensors` for diffusers' file, a directory for PEFT's. The file's factors carry
            the scale (alpha = rank): several loaders do not read its metadata and take alpha for
            the rank. The directory keeps alpha as it is.
        table: the `rules.Table` of the parameters that it adapts.
        prefix: the component in diffusers' file: "transformer" or "unet".
        dtype: "bfloat16", "float32", or None to keep it.
    """
    path = Path(path)
    tensors, config = to_tensors(adapter, table, fold=path.suffix == ".safetensors")
    if path.suffix == ".safetensors":
        tensors = {f"{prefix}.{key}": array for key, array in tensors.items()}
        text = json.dumps({f"{prefix}.{key}": v for key, v in config.items()}, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(path, tensors, {"format": "pt", METADATA: text}, dtype)
        return
    if path.suffix:
        raise ConfigError(f"{path.name!r}: give a .safetensors file or a directory", "lora.save")
    path.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_PREFIX + key: array for key, array in tensors.items()}
    files.write_safetensors(path / PEFT_FILES[0], tensors, dtype=dtype)
    text = json.dumps({"peft_type": "LORA", **config}, indent=2, sort_keys=True)
    (path / "adapter_config.json").write_text(text + "\n")


def to_tensors(adapter, table=None, fold=False):
    """`({module.lora_A.weight: array}, PEFT config)`; `fold` multiplies B by the scale."""
    table, tensors, ranks, alphas = table or rules.Table(), {}, {}, {}
    for path, parts in lora.modules(adapter).items():
        a, b, scale = (np.asarray(parts[k], np.float32) for k in ("lora_A", "lora_B", "scale"))
        layers = rules.stack_of(path + lora.KERNEL, table)
        rows = zip(a, b, scale, strict=True) if layers else [(a, b, scale)]
        names = rules.keys_of(path + lora.KERNEL, a.shape, table)
        for key, (one_a, one_b, one_scale) in zip(names, rows, strict=True):
            name = key.removesuffix(".weight")
            if fold:
                one_b, one_scale = one_b * one_scale, 1.0
            one_b = one_b[None, None] if one_a.ndim == 4 else one_b
            tensors[f"{name}.lora_A.weight"] = rules.to_torch("kernel", one_a)
            tensors[f"{name}.lora_B.weight"] = rules.to_torch("kernel", one_b)
            ranks[name] = one_a.shape[-1]
            alphas[name] = float(one_scale) * ranks[name]
    return tensors, peft_config(ranks, alphas)


def peft_config(ranks, alphas):
    """PEFT's config: the commonest rank and alpha, and patterns for the modules that differ."""

    def split(values):
        common = collections.Counter(values.values()).most_common(1)[0][0]
        rest = {f"^{re.escape(k)}": v for k, v in values.items() if v != common}
        return common, rest

    rank, rank_pattern = split(ranks)
    alpha, alpha_pattern = split({k: round(v, 6) for k, v in alphas.items()})
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
