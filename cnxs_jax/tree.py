"""Parameter trees as flat dicts of 'a/b/kernel' paths, and the one regex dialect over them.

The same dialect serves sharding, freezing, LoRA targets and weight decay: a pattern is a Python
regular expression that must match the whole path (`re.fullmatch`), the first match wins.
"""

import re

import jax

from cnxs_jax.errors import ConfigError


def flatten(tree):
    """{"a/b/kernel": leaf} of any pytree, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


def unflatten(flat):
    """The nested dict of a flat {"a/b/kernel": leaf}."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(fn, tree, *rest):
    """`jax.tree.map` whose function receives the 'a/b/kernel' path first."""
    return jax.tree_util.tree_map_with_path(
        lambda k, *v: fn(jax.tree_util.keystr(k, simple=True, separator="/"), *v), tree, *rest
    )


def matches(patterns, path):
    """Whether any of `patterns` (a string or a sequence) matches the whole `path`."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(re.fullmatch(p, path) for p in patterns)


def check_rules(rules, paths, where):
    """Raises ConfigError for a pattern that is no regex or matches none of `paths`."""
    paths = list(paths)
    for pattern in rules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}", where) from None
        if not any(compiled.fullmatch(p) for p in paths):
            raise ConfigError(
                f"the pattern {pattern!r} matches no parameter",
                where,
                f"patterns match whole paths such as {paths[0]!r}" if paths else None,
            )


def split(tree, patterns):
    """`(matching, rest)`: two nested dicts; `merge` puts them together again."""
    flat = flatten(tree)
    hit = {p: v for p, v in flat.items() if matches(patterns, p)}
    return unflatten(hit), unflatten({p: v for p, v in flat.items() if p not in hit})


def merge(*trees):
    """The union of nested dicts with disjoint leaves."""
    return unflatten({p: v for tree in trees for p, v in flatten(tree).items()})


def size(tree):
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
