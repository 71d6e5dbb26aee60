"""The page of the studies: tables from OUT/*.json and one picture each."""

import json

import numpy as np

from cnxs_jax.storage import replacing, write_text
from eval import report

TITLES = {
    "experts": "(a) Experts against one shared model",
    "attention": "(b) Attention to text, and a prompt switched on the way",
    "painting": "(c) Painted words",
    "style": "(d) A reference picture's style",
    "encoders": "(e) Which encoder",
}
TABLES = ("levels", "rows", "drawn")


def write(out):
    """OUT/report.md of every study that is there; its path."""
    parts = ["# eDiff-I on the embedded world"]
    for name, title in TITLES.items():
        path = out / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        parts.append(f"## {title}")
        if (out / f"{name}.png").is_file():
            parts.append(f"![{title}]({name}.png)")
        parts += [report.table(found[key]) for key in TABLES if found.get(key)]
        if "spearman" in found:
            parts.append(f"Spearman of noise and attention to text: {found['spearman']:.3f}")
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def picture(path, name, found, shown):
    """Writes the study's picture: rows of samples, or the ratios of the arms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shown is not None:
        save(path, grid(shown["images"], shown["prompts"]))
    elif name == "experts":
        ratios(path, found["rows"])


def grid(images, prompts):
    """Rows of pictures with their names at the left and the prompts above."""
    from matplotlib import pyplot as plt

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
        panel.set_title(prompt.replace(" and ", "\nand "), fontsize=7)
    return figure


def ratios(path, rows):
    """The loss of each arm over the shared model's in every noise interval."""
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    own = [row for row in rows if row["quantiles"] != "all"]
    places = np.arange(len(own))
    arms = [k for k in own[0] if k not in ("quantiles", "expert") and "each" not in k]
    for arm in arms:
        panel.plot(places, [row[arm] for row in own], marker="o", label=arm)
    panel.axhline(1.0, color="grey", linewidth=1, label="shared")
    panel.set_xticks(places, [row["quantiles"].replace(" to ", "\n") for row in own], fontsize=8)
    panel.set_xlabel("quantiles of the training noise, low noise left")
    panel.set_ylabel("held-out loss over the shared model's")
    panel.legend(frameon=False)
    save(path, figure)


def save(path, figure):
    """The figure as a PNG, whole or not at all."""
    from matplotlib import pyplot as plt

    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
