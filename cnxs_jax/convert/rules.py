"""Parameter trees <-> PyTorch tensors, by rule, strictly, in both directions.

Two steps. A family's `Table` rewrites a foreign layout to diffusers'/transformers' names by ordered
rules, and the mechanical rule of docs/architecture.md turns those into our paths: list indices are
joined to their list by an underscore, `weight` becomes kernel, scale or embedding (the target tree
says which), scanned layers are stacked on a leading axis.

Every source tensor must be used exactly once or be ignored by name, every leaf must be filled
exactly once; all that is wrong is reported together.
"""

import difflib
import heapq
import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cnxs_jax import tree
from cnxs_jax.errors import CheckpointError

MAX_NAMES = 20
MAX_CHOICES = 2000
MAX_CANDIDATES = 24
WEIGHTS = ("kernel", "scale", "embedding")
FIELDS = {
    "p": "weight|bias",
    "side": "en|de",
    "rest": ".+",
}  # any other {name} in a template is a list index


@dataclass(frozen=True)
class Rule:
    """One line of a table: `source` template -> one diffusers template, or several.

    Templates are names with `{n}` (an index), `{p}` (weight or bias) and `{rest}` (anything). With
    several targets the tensor is split into equal parts along its first axis. `squeeze` takes a
    1x1 convolution [o, i, 1, 1] to the linear layer [o, i] that it is; `conv` does so, too, and
    writes the convolution. `transpose` is for a matrix that the layout stores as [i, o].
    """

    source: str
    targets: tuple[str, ...]
    squeeze: bool = False
    conv: bool = False
    transpose: bool = False


@dataclass(frozen=True)
class Table:
    """How a family's tensors are named.

    Args:
        rules: ordered, first match wins; empty: the keys are diffusers' already.
        stacked: our paths whose list is stacked on a leading axis ("transformer_blocks").
        paths: exceptions to the mechanical rule, (torch key, our path).
        aliases: (alias, key): two names of one tied tensor, stored under `key`.
        literal: names that end in an underscore and a number in PyTorch, too.
        side: (source key, name): tensors that belong beside the parameters.
        ignore: patterns of source keys that hold no weights.
    """

    rules: tuple[Rule, ...] = ()
    stacked: tuple[str, ...] = ()
    paths: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    literal: tuple[str, ...] = ("linear", "wi")
    side: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()


class Problems:
    """Collects what is wrong, to say it once."""

    def __init__(self, where):
        self.where, self.lists = where, {}

    def add(self, kind, text, choices=()):
        """`choices`: the names of which the nearest to `text` is offered, if `text` is shown."""
        self.lists.setdefault(kind, []).append((text, choices))

    def check(self):
        """Raises CheckpointError with counts and at most 20 names a kind."""
        if not self.lists:
            return
        lines = []
        for kind, found in self.lists.items():
            lines.append(f"{len(found)} {kind}:")
            lines += [f"    {text}{near(text, choices)}" for text, choices in found[:MAX_NAMES]]
            if len(found) > MAX_NAMES:
                lines.append(f"    and {len(found) - MAX_NAMES} more")
        raise CheckpointError(
            "the weights do not fit the model: " + "\n  ".join(lines),
            self.where,
            "check that the config belongs to these weights",
        )


def to_params(tensors, target, table=None, where="weights", dtype=np.float32):
    """The parameter tree of `target`'s structure, filled from PyTorch tensors.

    Args:
        tensors: {source key: array}; not changed.
        target: nested dict of shapes from `jax.eval_shape(module.init, ...)["params"]`.
        table: the family's `Table`; None: diffusers names, nothing stacked.
        dtype: floating dtype of the result.

    Raises CheckpointError listing every unknown, missing, doubled, ill-shaped or non-finite tensor.
    """
    return tree.unflatten(fill(*fit(tensors, target, table, where), dtype))


def fit(tensors, target, table=None, where="weights"):
    """`(plan, shapes, problems)` of `to_params`, everything checked and nothing copied yet.

    The plan is [(path, layer or None, source key, array)]: which tensor goes where.
    """
    table, problems = table or Table(), Problems(where)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(target).items()}
    named, unknown = to_diffusers(tensors, table, problems)
    plan, filled = [], {}
    for key, (source, array) in named.items():
        path, index = path_of(key, table, shapes)
        if path is None:
            unknown.append(source)
            continue
        slots = filled.setdefault(path, set())
        if index in slots:
            problems.add("tensors for one place", f"{source} fills {path} again")
        slots.add(index)
        check_fit(path, index, source, array, shapes[path], problems)
        plan.append((path, index, source, array))
    missing = missing_keys(shapes, filled, table)
    for key in missing:
        problems.add("missing tensors", key, unknown)
    for source in sorted(set(unknown)):
        problems.add("unknown tensors", source, missing)
    problems.check()
    return plan, shapes, problems


def check_fit(path, index, source, array, shape, problems):
    """Shape, dtype and values of one tensor against its leaf; nothing is copied yet."""
    part = shape if index is None else shape[1:]
    if index is not None and index >= shape[0]:
        problems.add("unknown tensors", f"{source}: the model has {shape[0]} layers")
    elif from_torch(path, array).shape != part:
        expected = to_torch_shape(path, part)
        problems.add("wrong shapes", f"{source}: got {array.shape}, expected {expected}")
    elif not is_float(array):
        problems.add("wrong dtypes", f"{source}: got {array.dtype}, expected a floating one")
    elif not np.isfinite(array).all():
        problems.add("tensors with NaN or Inf", source)


def fill(plan, shapes, problems, dtype):
    """{path: array}, one conversion a tensor, straight into its layer of the stack."""
    params = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for path, index, source, array in plan:
        slot = params[path] if index is None else params[path][index, ...]
        with np.errstate(over="ignore"):
            slot[...] = from_torch(path, array)
        if array.dtype != slot.dtype and not np.isfinite(slot).all():
            problems.add(f"tensors too large for {np.dtype(dtype)}", source)
    problems.check()
    return params


def to_tensors(params, table=None, side=None, where="parameters"):
    """{PyTorch key: array} of a parameter tree: the inverse of `to_params`.

    Args:
        side: {name: array} of tensors beside the parameters, stored where the layout has a place.
    """
    table, problems, named = table or Table(), Problems(where), {}
    for path, leaf in tree.flatten(params).items():
        leaf = np.asarray(leaf)
        layers = leaf if stack_of(path, table) else [leaf]
        for key, array in zip(keys_of(path, leaf.shape, table), layers, strict=True):
            named[key] = to_torch(path, array)
    tensors = from_diffusers(named, table, problems) if table.rules else named
    for source, name in table.side:
        if side and name in side:
            tensors[source] = np.asarray(side[name])
    problems.check()
    return tensors


def side_tensors(tensors, table):
    """{name: float32 array} of what lies beside the parameters in this layout."""
    return {name: to_float(tensors[key]) for key, name in table.side if key in tensors}


# Foreign layout <-> diffusers names


def template_regex(template):
    """The compiled regex of a template; its groups are the template's fields."""
    parts = re.split(r"\{(\w+)\}", template)
    text = "".join(
        f"(?P<{part}>{FIELDS.get(part, '[0-9]+')})" if i % 2 else re.escape(part)
        for i, part in enumerate(parts)
    )
    return re.compile(text)


def to_diffusers(tensors, table, problems):
    """`({diffusers key: (source key, array)}, [unknown source keys])`."""
    rules = [(template_regex(rule.source), rule) for rule in table.rules]
    side, named, unknown = {key for key, _ in table.side}, {}, []
    for source, array in tensors.items():
        if source in side or tree.matches(table.ignore, source):
            continue
        pieces = [(source, array)] if not rules else apply_rules(source, array, rules, problems)
        if not pieces:
            unknown.append(source)
        for key, piece in pieces:
            key = resolve_alias(key, piece, tensors, table, problems)
            if key is None:
                continue
            if key in named:
                problems.add(
                    "tensors for one place", f"{source} and {named[key][0]} are both {key}"
                )
            named[key] = (source, piece)
    return named, unknown


def apply_rules(source, array, rules, problems):
    """[(diffusers key, array)] by the first rule that matches; empty if none does."""
    for regex, rule in rules:
        match = regex.fullmatch(source)
        if not match:
            continue
        keys = [target.format(**match.groupdict()) for target in rule.targets]
        if (rule.squeeze or rule.conv) and array.ndim == 4 and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]
        if rule.transpose:
            array = array.T
        if len(keys) == 1:
            return [(keys[0], array)]
        if array.ndim == 0 or array.shape[0] % len(keys):
            problems.add("wrong shapes", f"{source}: {array.shape} has no {len(keys)} equal parts")
            return []
        return list(zip(keys, np.split(array, len(keys)), strict=True))
    return []


def resolve_alias(key, array, tensors, table, problems):
    """The name under which a tied tensor is kept; None if its twin is there already."""
    for alias, name in table.aliases:
        if key == alias:
            twin = tensors.get(name)
            if twin is None:
                return name
            if twin.shape != array.shape or not np.array_equal(to_float(twin), to_float(array)):
                problems.add("tied tensors that differ", f"{alias} and {name}")
            return None
    return key


def from_diffusers(named, table, problems):
    """The tensors in the table's foreign layout: each rule backwards."""
    found, parts = {}, {}
    patterns = [
        (template_regex(target), rule, i)
        for rule in table.rules
        for i, target in enumerate(rule.targets)
    ]
    for key, array in named.items():
        for regex, rule, i in patterns:
            match = regex.fullmatch(key)
            if match:
                source = rule.source.format(**match.groupdict())
                array = array[:, :, None, None] if rule.conv and array.ndim == 2 else array
                array = array.T if rule.transpose else array
                parts.setdefault((source, len(rule.targets)), {})[i] = array
                break
        else:
            problems.add("tensors without a place in this layout", key)
    for (source, count), pieces in parts.items():
        if len(pieces) != count:
            problems.add("incomplete tensors", f"{source}: {len(pieces)} of {count} parts")
        else:
            ordered = [pieces[i] for i in range(count)]
            found[source] = ordered[0] if count == 1 else np.concatenate(ordered)
    return found


# diffusers names <-> our paths


def path_of(key, table, shapes):
    """`(path, layer index or None)` of a diffusers key in the target, or `(None, None)`."""
    for name, path in table.paths:
        if key == name:
            return (path, None) if path in shapes else (None, None)
    path = re.sub(r"\.([0-9]+)(?=\.|$)", r"_\1", key).replace(".", "/")
    index = None
    for stack in table.stacked:
        match = re.match(re.escape(stack) + r"_([0-9]+)/(.+)", path)
        if match:
            index, path = int(match[1]), f"{stack}/{match[2]}"
    parent, _, name = path.rpartition("/")
    names = WEIGHTS if name == "weight" else (name,)
    for name in names:
        candidate = f"{parent}/{name}" if parent else name
        if candidate in shapes:
            return candidate, index
    return None, None


def stack_of(path, table):
    """The stacked list that holds the path, or None."""
    exceptions = {path for _, path in table.paths}
    if path in exceptions:
        return None
    return next((s for s in table.stacked if path.startswith(s + "/")), None)


def keys_of(path, shape, table):
    """The diffusers keys of a leaf: one, or one a layer."""
    for name, ours in table.paths:
        if path == ours:
            return [name]
    stack = stack_of(path, table)
    if stack is None:
        return [dotted(path, table)]
    rest = path[len(stack) + 1 :]
    return [f"{dotted(stack, table)}.{i}.{dotted(rest, table)}" for i in range(shape[0])]


def dotted(path, table):
    """`a/b_0/kernel` -> `a.b.0.weight`."""
    parts = path.split("/")
    if parts[-1] in WEIGHTS:
        parts[-1] = "weight"
    literal = "|".join(map(re.escape, table.literal))
    return ".".join(
        p if re.fullmatch(rf"({literal})_\d+", p) else re.sub(r"_(\d+)$", r".\1", p) for p in parts
    )


def missing_keys(shapes, filled, table):
    """The diffusers keys of leaves, or layers of leaves, that nothing fills."""
    missing = []
    for path, shape in shapes.items():
        keys = keys_of(path, shape, table)
        have = filled.get(path, set())
        if not stack_of(path, table):
            missing += [] if have else keys
        else:
            missing += [key for i, key in enumerate(keys) if i not in have]
    return missing


# Arrays


def from_torch(path, array):
    """A PyTorch tensor in our orientation: Linear [i, o], Conv HWIO."""
    if not path.endswith("kernel") or array.ndim < 2:
        return array
    return np.moveaxis(array, (1, 0), (-2, -1))


def to_torch(path, array):
    """Our array in PyTorch's orientation: Linear [o, i], Conv OIHW."""
    if not path.endswith("kernel") or array.ndim < 2:
        return array
    return np.moveaxis(array, (-2, -1), (1, 0))


def to_torch_shape(path, shape):
    """The shape that PyTorch's tensor has for one of ours."""
    return to_torch(path, np.broadcast_to(np.int8(0), shape)).shape


def is_float(array):
    """Whether the dtype is a floating one, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def to_float(array):
    """float32 copy."""
    return np.array(array, dtype=np.float32, order="C")


def near(name, choices):
    """` (nearest: x)`, or nothing. difflib sees only the names that share most parts with `name`.

    It takes a tenth of a millisecond a pair, and PixArt's 445 names all resemble each other.
    """
    parts = set(name.split("."))
    shared = heapq.nlargest(
        MAX_CANDIDATES,
        choices[:MAX_CHOICES],
        key=lambda c: (len(parts.intersection(c.split("."))), -abs(len(c) - len(name))),
    )
    found = difflib.get_close_matches(name, shared, n=1, cutoff=0.75)
    return f" (nearest: {found[0]})" if found else ""
