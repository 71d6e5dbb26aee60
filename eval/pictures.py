"""The pictures of a report: the same prompts and noise side by side, and quality curves."""

import io
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


def quality_plot(rows, metrics, references=()):
    """Quality against network evaluations: one panel a metric, one line a method.

    Args:
        rows: dicts with `method` (the line), `evaluations` and the metrics, as in a report.
        metrics: {row key: axis label}.
        references: methods drawn as horizontal lines (the teacher at many steps).

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
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.6 * len(metrics), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (metric, label) in zip(axes[0], metrics.items(), strict=True):
        for index, method in enumerate(methods):
            _line(
                axis, [r for r in rows if r["method"] == method], metric, method, index, references
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({r["evaluations"] for r in rows if r["method"] not in references})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xlabel("network evaluations an image")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return _to_image(figure, plt)


def _line(axis, rows, metric, method, index, references):
    points = [(r["evaluations"], _value(r, metric), r[metric]) for r in rows]
    points = sorted((p for p in points if p[1] is not None), key=lambda p: p[0])
    if not points:
        return
    x, y = [p[0] for p in points], [p[1] for p in points]
    if method in references:
        style = ("--", ":")[list(references).index(method) % 2]
        axis.axhline(y[-1], color="black", linestyle=style, label=f"{method} ({x[-1]} evaluations)")
        return
    below = [v - _bound(p[2], "low", v) for v, p in zip(y, points, strict=True)]
    above = [_bound(p[2], "high", v) - v for v, p in zip(y, points, strict=True)]
    student = "student" in method
    axis.errorbar(
        [v * 2 ** (0.03 * (index - 2)) for v in x],  # apart, so that intervals can be read
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
    return value if isinstance(value, int | float | np.number) else None


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
