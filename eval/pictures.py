"""The pictures of a report: the same prompts and noise side by side, and curves."""

import io
import math
from pathlib import Path

import numpy as np

from cnxs_jax.errors import DataError

MARGIN, TEXT = 8, 15


def sample_grid(columns, captions, tile=128):
    """Samples of several methods for the same prompts: one column a method, one row a prompt.

    Args:
        columns: list of (heading, images uint8 `[N, H, W, 3]`), all for the same N prompts; a
            heading may have several lines.
        captions: the N prompts; each is printed above its row.
        tile: side in pixels at which a sample is shown (whole multiples keep pixels square).

    Returns:
        a PIL image.

    Raises:
        DataError: columns of different length.
    """
    from PIL import Image, ImageDraw

    sizes = {len(images) for _, images in columns} | {len(captions)}
    if len(sizes) != 1 or not columns:
        raise DataError(f"a grid needs columns of one length, got {sorted(sizes)}", "sample_grid")
    font, bold = _font("DejaVuSans.ttf"), _font("DejaVuSans-Bold.ttf")
    head = max(heading.count("\n") + 1 for heading, _ in columns) * (TEXT + 4) + MARGIN
    pitch = tile + MARGIN
    width = len(columns) * pitch + MARGIN
    lines = [_wrap(caption, font, width - 2 * MARGIN) for caption in captions]
    heights = [len(text) * (TEXT + 4) + tile + 2 * MARGIN for text in lines]
    canvas = Image.new("RGB", (width, head + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, (heading, _) in enumerate(columns):
        centre = MARGIN + c * pitch + tile // 2
        draw.multiline_text(
            (centre, MARGIN), heading, "black", bold, anchor="ma", align="center", spacing=3
        )
    top = head
    for n, text in enumerate(lines):
        draw.multiline_text((MARGIN, top), "\n".join(text), "#333333", font, spacing=3)
        y = top + len(text) * (TEXT + 4) + 2
        for c, (_, images) in enumerate(columns):
            sample = Image.fromarray(np.asarray(images[n]))
            canvas.paste(
                sample.resize((tile, tile), _filter(sample, tile)), (MARGIN + c * pitch, y)
            )
        top += heights[n]
    return canvas


AXES = {
    "evaluations": "network evaluations an image",
    "guidance_scale": "guidance scale",
    "steps": "steps",
    "scheduler": "scheduler",
}
DOUBLING = ("evaluations", "steps")  # axes that are logarithmic


def quality_plot(rows, metrics, references=(), axis="evaluations"):
    """Curves over what differs between the rows: one panel a metric, one line a method.

    Args:
        rows: dicts with `method` (the line), `axis` and the metrics, as in a report.
        metrics: {row key: axis label}.
        references: methods drawn as horizontal lines (the teacher at many steps).
        axis: the row key on the x axis, of AXES.

    Returns:
        a PIL image, or None where no row has any of the metrics.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    metrics = {k: v for k, v in metrics.items() if any(_value(r, k) is not None for r in rows)}
    if not metrics:
        return None
    methods = list(dict.fromkeys(r["method"] for r in rows))
    columns = min(len(metrics), 4)
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for empty in axes.flat[len(metrics) :]:
        empty.set_axis_off()
    for panel, (metric, label) in zip(axes.flat, metrics.items(), strict=False):
        for index, method in enumerate(methods):
            own = [r for r in rows if r["method"] == method]
            _line(panel, own, axis, metric, method, index, references)
        panel.set_xlabel(AXES[axis])
        panel.set_title(label)
        panel.grid(alpha=0.3)
        _ticks(panel, [r for r in rows if r["method"] not in references], axis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return _to_image(figure, plt)


def tradeoff_plot(rows, across, up, axis):
    """One metric against another, the points marked with what was swept.

    Args:
        across, up: (row key, label) of the x and y axis, such as CLIP score and FID.
        axis: the row key whose value stands beside each point.

    Returns:
        a PIL image, or None where no row has both.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    rows = [r for r in rows if _value(r, across[0]) is not None and _value(r, up[0]) is not None]
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(6, 4.6), layout="constrained")
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        x, y = ([_value(r, key) for r in own] for key in (across[0], up[0]))
        panel.plot(x, y, marker="o", label=method)
        for r, *spot in zip(own, x, y, strict=True):
            word = r[axis] if isinstance(r[axis], str) else f"{r[axis]:g}"
            panel.annotate(word, spot, (4, 4), textcoords="offset points", fontsize=8)
    panel.set_xlabel(across[1])
    panel.set_ylabel(up[1])
    panel.set_title(f"by {AXES[axis]}")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return _to_image(figure, plt)


def _ticks(panel, rows, axis):
    if axis in DOUBLING:
        panel.set_xscale("log", base=2)
        ticks = sorted({r[axis] for r in rows})
        panel.set_xticks(ticks, [str(t) for t in ticks])


def _line(panel, rows, axis, metric, method, index, references):
    points = [(r[axis], _value(r, metric), r[metric]) for r in rows if metric in r]
    points = [p for p in points if p[1] is not None]
    if not points:
        return
    if not isinstance(points[0][0], str):
        points = sorted(points, key=lambda p: p[0])
    x, y = [p[0] for p in points], [p[1] for p in points]
    if method in references:
        style = ("--", ":")[list(references).index(method) % 2]
        label = f"{method} ({x[-1]} evaluations)"
        panel.axhline(y[-1], color="black", linestyle=style, label=label)
        return
    below = [v - _bound(p[2], "low", v) for v, p in zip(y, points, strict=True)]
    above = [_bound(p[2], "high", v) - v for v, p in zip(y, points, strict=True)]
    student = "student" in method
    # Apart, so that intervals can be read.
    apart = [v * 2 ** (0.03 * (index - 2)) for v in x] if axis in DOUBLING else x
    panel.errorbar(
        apart,
        y,
        yerr=[np.maximum(below, 0), np.maximum(above, 0)],
        marker="o" if student else "s",
        linewidth=2.4 if student else 1.3,
        capsize=3,
        color="crimson" if student else f"C{index if index < 3 else index + 1}",
        label=method,
        zorder=3 if student else 2,
    )


def _value(row, metric):
    value = row.get(metric)
    value = value.get("value") if isinstance(value, dict) else value
    real = isinstance(value, int | float | np.number) and math.isfinite(value)
    return value if real else None


def _bound(figure, side, value):
    return figure.get(side, value) if isinstance(figure, dict) else value


def _to_image(figure, plt):
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _filter(sample, tile):
    from PIL import Image

    # Bicubic for whole enlargements too: nearest shows the raster, not the picture.
    return Image.Resampling.BICUBIC if tile >= sample.width else Image.Resampling.LANCZOS


def _font(name, size=TEXT):
    """DejaVu as matplotlib ships it: the same captions on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def _wrap(text, font, width):
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]
