"""What the studies of a paper share: a page of tables and pictures, and when one is made again.

A study is a function that returns figures (tables under `TABLES`) and, perhaps, rows of pictures.
"""

import hashlib
import json
import re
import textwrap

from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.storage import replacing, write_json, write_text
from eval import report

TABLES = ("levels", "rows", "intervals", "bounds", "drawn", "costs")


def make(out, name, settings, function, again=False):
    """Makes OUT/<name>.json and .png with `function() -> (figures, shown)`, unless they are there.

    Args:
        settings: what decides the figures, JSON-able; other ones make the study anew.
        function: `figures` has lists of rows; `shown` is None, a matplotlib figure, or
            {"prompts", "images": {row: pictures}}.
        again: make it in any case.
    """
    path, wanted = out / f"{name}.json", json.loads(json.dumps(settings))
    if path.is_file() and not again and json.loads(path.read_text())["settings"] == wanted:
        print(f"{name}: made before, see {path}", flush=True)
        return
    found, shown = function()
    if isinstance(shown, dict):
        shown = grid(shown["images"], shown["prompts"])
    if shown is not None:
        save(out / f"{name}.png", shown)
    write_json(path, report.plain({"settings": wanted} | found), sort_keys=False)  # it ends a study
    print(f"{name}: {path}", flush=True)


def check_names(words, known, flag):
    """Raises ConfigError for a flag's list without a word, with one twice or an unknown one."""
    if not words or len(set(words)) < len(words):
        what = f"expected different names, got {','.join(words) or 'none'}"
        raise ConfigError(what, flag, f"some of {', '.join(known)}")
    for word in words:
        if word not in known:
            what = f"unknown {word!r}.{did_you_mean(word, known)}"
            raise ConfigError(what, flag, f"some of {', '.join(known)}")


def check_seeds(words):
    """`--seeds` as whole numbers; ConfigError for none, others, or one twice."""
    seeds = [int(word) for word in words if re.fullmatch("[0-9]{1,9}", word)]
    if not words or len(set(seeds)) < len(words):
        what = f"expected different whole numbers, got {','.join(words) or 'none'}"
        raise ConfigError(what, "--seeds", "--seeds=0,1,2")
    return seeds


def digest(texts):
    """One hash of several texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def write(out, title, titles):
    """OUT/report.md of every study of `titles` ({name: heading}) that is there; its path."""
    parts = [f"# {title}"]
    for name, heading in titles.items():
        path = out / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        parts.append(f"## {heading}")
        if (out / f"{name}.png").is_file():
            parts.append(f"![{heading}]({name}.png)")
        parts += [report.table(found[key]) for key in TABLES if found.get(key)]
        parts += found.get("notes", [])
        parts.append(", ".join(f"{k}: {shortened(v)}" for k, v in found["settings"].items()))
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def shortened(value):
    """A setting as it is printed; digests by their first digits."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def grid(images, prompts):
    """Rows of pictures with their names at the left and the prompts above."""
    plt = plots()
    count = len(prompts)
    figure, axes = plt.subplots(
        len(images), count, figsize=(1.3 * count + 1.6, 1.25 * len(images) + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, (label, row) in zip(axes, images.items(), strict=True):
        for panel, image in zip(line, row, strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for panel, prompt in zip(axes[0], prompts, strict=True):
        panel.set_title(textwrap.fill(prompt, 20), fontsize=7)  # a column has room for so many
    return figure


def plots():
    """matplotlib's pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def save(path, figure):
    """The figure as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plots().close(figure)
