"""Reports for people and machines: `report.json`, `report.md` (pictures first) and its PNGs.

Shared by `python -m train` and `python -m eval`. A row is a flat dict; a figure with an interval is
`{"value": v, "low": l, "high": h}`, with `chance` where that has a meaning; what was not run is the
string "not run (why)". `n` is the figure's sample count, of a distance `num_x` and `num_y`.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from cnxs_jax.errors import DataError
from cnxs_jax.storage import replacing, write_json, write_text

DIRECTORY = "pictures"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG of the report.

    Attributes:
        name: file name without suffix.
        image: uint8 array `[H, W, 3]` or a PIL image.
        caption: one sentence that says what is seen.
    """

    name: str
    image: object
    caption: str


def write_report(workdir, rows, pictures=(), *, title="Report", summary=None, notes=(), groups=()):
    """Writes `report.json`, `report.md` and `pictures/*.png` under `workdir`, each atomically.

    Args:
        workdir: directory, made if missing.
        rows: list of flat dicts, one a row of the table; the columns are the union of the keys in
            order of first appearance.
        pictures: `Picture`s, shown first and in this order.
        title: heading.
        summary: dict of single figures (training cost, settings), kept in JSON and printed.
        notes: sentences printed below the table.
        groups: tuples of column names, one table each, so that wide rows stay readable; columns in
            no group come in a last table. Without groups there is one table.

    Returns:
        the path of `report.md`.

    Raises:
        DataError: a row that is no dict, or two pictures of one name.
    """
    workdir = Path(workdir)
    if not all(isinstance(r, dict) for r in rows):
        raise DataError("every row of a report is a dict of figures", "write_report")
    names = [p.name for p in pictures]
    if len(set(names)) < len(names):
        raise DataError(f"two pictures share a name: {sorted(names)}", "write_report")
    (workdir / DIRECTORY).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        _save_png(workdir / DIRECTORY / f"{picture.name}.png", picture.image)
    files = [{"file": f"{DIRECTORY}/{p.name}.png", "caption": p.caption} for p in pictures]
    content = {
        "title": title,
        "summary": summary or {},
        "rows": list(rows),
        "pictures": files,
        "notes": list(notes),
    }
    write_json(workdir / "report.json", plain(content), sort_keys=False)
    write_text(workdir / "report.md", _markdown(content, groups))
    return workdir / "report.md"


def columns_of(rows):
    """The union of the rows' keys in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _split(rows, groups):
    """The columns of each table: those of `groups` that carry figures, then all others."""
    every, common = columns_of(rows), set.intersection(*map(set, groups)) if groups else set()
    tables = [[c for c in group if c in every] for group in groups]
    tables = [t for t in tables if set(t) - common]
    rest = [c for c in every if not any(c in group for group in groups)]
    lead = [c for c in every if c in common]
    return [*tables, [*lead, *rest]] if rest or not tables else tables


def table(rows, columns=None):
    """A markdown table of dict rows; figures with three significant digits, intervals in []."""
    columns = columns_of(rows) if columns is None else columns
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join(" --- " for _ in columns) + "|")
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, dict):
        text = _cell(value.get("value"))
        if "low" in value:
            text += f" [{_cell(value['low'])}, {_cell(value['high'])}]"
        text += f" *chance {_cell(value['chance'])}*" if "chance" in value else ""
        return text + _counted(value)
    if isinstance(value, float | np.floating):
        small = 0 < abs(value) < 1e-3
        return "-" if not math.isfinite(value) else f"{value:.1e}" if small else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def _counted(figure):
    """The sample count of a figure: of both samples of a distance."""
    if "num_x" in figure:
        return f" n={figure['num_x']}/{figure['num_y'] or '?'}"
    return f" n={figure['n']}" if "n" in figure else ""


def plain(value):
    """`value` with numpy values as numbers and non-finite ones as None, for JSON."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _markdown(content, groups):
    parts = [f"# {content['title']}"]
    parts += [f"{p['caption']}\n\n![{p['caption']}]({p['file']})" for p in content["pictures"]]
    if content["rows"]:
        parts += [table(content["rows"], columns) for columns in _split(content["rows"], groups)]
    parts += content["notes"]
    if content["summary"]:
        parts.append("\n".join(f"- {k}: {_cell(v)}" for k, v in content["summary"].items()))
    return "\n\n".join(parts) + "\n"


def _save_png(path, image):
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise DataError(
                f"a picture is uint8 [H, W, 3], got {image.dtype} {image.shape}", path.name
            )
        image = Image.fromarray(image)
    with replacing(path) as part:
        image.save(part, format="PNG", optimize=True)
