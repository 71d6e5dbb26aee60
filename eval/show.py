"""What a report shows: the picture grid, the curves, the tables' columns, the sentences below."""

from eval import pictures, report

SHOWN = 8  # prompts in the picture grid
COLUMNS = 10  # rows that the picture grid shows, at most
# The report's tables; columns that are named nowhere come last.
GROUPS = (
    ("objects", "style", "background", "relation", "items", "all_correct", "extra_objects"),
    ("kid_efflite0", "sharpness", "rmse", "psnr", "same_verdicts"),
    ("held-out pair: object", "held-out pair: style", "held-out pair: all correct"),
    ("held-out relation", "held-out relation: all correct"),
    (
        "control_edge_f1@1px",
        "control_edge_precision@1px",
        "control_edge_recall@1px",
        "control_mask_iou",
        "control_depth_mse",
        "control_depth_mae",
        "control_depth_order",
        "control_hed_distance",
    ),
)
# Columns that are plotted, by the beginning of their name, and what the panel is called.
PLOTTED = {
    "control_edge_f1@1px": "edge F1 at 1 px",
    "control_mask_iou": "mask IoU",
    "objects": "objects found",
    "all_correct": "all correct",
    "fid": "FID, lower is better",
    "fd_": "Frechet distance ({}), lower is better",
    "kid_": "KID ({}), lower is better",
    "cmmd": "CMMD, lower is better",
    "mmd_rbf_": "MMD ({}), lower is better",
    "clip_score_": "CLIP score ({})",
    "r_precision_": "R-precision ({})",
    "precision_": "precision ({})",
    "recall_": "recall ({})",
    "sharpness": "sharpness (1 = real scenes)",
    "lpips": "LPIPS to the first row",
    "ssim": "SSIM to the first row",
}
CONTROL_NOTE = (
    "Control pictures: {}, of the same held-out scenes. Edges: Canny on what was drawn and on the "
    "scene itself, right within 1 px. Masks: what is no background, against the exact objects. "
    "Depth: ranks of the sprites that redraw the picture best, against the exact ones, 1 the "
    "nearest of three. The rows of real scenes say how well the detectors read."
)
ALIGNMENT = ("clip_score_", "r_precision_", "objects")  # x of the trade-off, the first there is
DISTANCE = ("fid", "fd_", "kid_", "cmmd", "mmd_rbf_")  # y


def write(out, table, planned, make, summary=None):
    """`report.md`, `report.json` and the pictures: samples side by side, then the curves."""
    grid, caption = _grid(planned, make)
    made = [report.Picture("samples", grid, caption)]
    lines = [line for line in table if line.get(planned.axis) is not None]
    found = plotted(table)
    if len({line[planned.axis] for line in lines}) > 1:
        curves = pictures.quality_plot(lines, found, planned.references, planned.axis)
        what = f"Quality against {pictures.AXES[planned.axis]}, with 95 % intervals."
        made += [report.Picture("quality", curves, what)] if curves else []
        if planned.swept:
            made += _tradeoff(lines, found, planned.axis)
    lead = ("method", *[k for k in planned.swept if k != "steps"], "steps", "evaluations")
    groups = tuple((*lead, *group) for group in GROUPS)
    return report.write_report(out, table, made, title=planned.title, summary=summary,
                               notes=planned.notes, groups=groups)  # fmt: skip


def _grid(planned, make):
    """The picture grid and its caption."""
    test = planned.sets["test"]
    columns = []
    if planned.pairs is not None:
        columns.append(("reference", planned.pairs[:SHOWN]))
    elif test.images is not None:
        heading = "a real scene\nfor the prompt" if test.facts is not None else "real"
        columns.append((heading, test.images[:SHOWN]))
    rows = planned.shown or planned.rows
    if len(rows) > COLUMNS:  # evenly chosen, with both ends
        rows = [rows[n * (len(rows) - 1) // (COLUMNS - 1)] for n in range(COLUMNS)]
    columns += [(_heading(row), make(row, test.head(SHOWN))[:SHOWN]) for row in rows]
    number = len(columns[0][1])
    captions = list(test.captions[:number]) if test.captions else [""] * number
    drawn = planned.rows[0].steps is not None
    what = "The same prompts and the same noise" if drawn else "The first pictures"
    return pictures.sample_grid(columns, captions), f"{what}, side by side."


def _heading(row):
    if row.steps is None:
        return row.method
    solver = row.scheduler
    if row.model != "pipeline":
        solver = row.method.removeprefix(row.model).split(",")[0].strip()
    if row.model == "student":
        solver = solver or "consistency"
    scale = f"scale {row.guidance_scale:g}" if row.guidance_scale is not None else ""
    steps = "guided\n" * row.guided + f"{row.steps} step{'s' * (row.steps > 1)}"
    evaluations = f"{row.evaluations} evaluation{'s' * (row.evaluations > 1)}"
    return "\n".join(filter(None, (row.model, solver, scale, steps, evaluations)))


def plotted(table):
    """{column: label} of the columns in `PLOTTED` that the table has, in that order."""
    columns, found = report.columns_of(table), {}
    for start, label in PLOTTED.items():
        for c in columns:
            if c == start or (start.endswith("_") and c.startswith(start)):
                found[c] = label.format(c.removeprefix(start))
    return found


def _tradeoff(lines, found, axis):
    """A distance against text alignment, where both were measured (FID against CLIP score)."""
    across = next((c for start in ALIGNMENT for c in found if c.startswith(start)), None)
    up = next((c for start in DISTANCE for c in found if c.startswith(start)), None)
    if across is None or up is None:
        return []
    image = pictures.tradeoff_plot(lines, (across, found[across]), (up, found[up]), axis)
    what = "Distance to real pictures against text alignment; each point is one setting."
    return [report.Picture("tradeoff", image, what)] if image else []


def shown_rows(rows):
    """Columns of the comparison's grid: the reference, the teacher's 4 evaluations, the student."""
    teacher = [r for r in rows if r.model == "teacher"]
    few = [r for r in teacher if r.evaluations == 4]
    return tuple([*teacher[:1], *few, *(r for r in rows if r.model == "student")])


def notes(planned_prompts, num_real, guidance_scale, metrics, features="efflite0"):
    """The sentences below the tables."""
    out = [
        f"{planned_prompts} prompts, the same noise in every row; guidance scale "
        f"{guidance_scale}. An evaluation is one pass of one picture through the network: a guided "
        "step needs two. In brackets: 95 % intervals; n: what was counted (of a distance: "
        "pictures/real pictures); *chance*: the same figure with the prompts shuffled among the "
        "pictures. Paired figures (rmse, psnr, ssim, lpips, same_verdicts) are with the first "
        "drawn row. Sharpness is gradient energy relative to real pictures."
    ]
    if {"kid", "fd", "mmd", "prdc", "fid", "cmmd"} & set(metrics):
        out.append(
            f"Distances are to {num_real} real pictures. KID (cubic kernel) and MMD are unbiased, "
            "so that they may be negative; Frechet distances are biased upwards by small samples: "
            "compare those of one n only."
            + (" EfficientNet-Lite0 reads pictures at 128 px." if features == "efflite0" else "")
        )
    if "kid" in metrics and planned_prompts < 1000:
        out.append(f"KID of {planned_prompts} pictures: fewer than the 1000 that a claim needs.")
    if "fid" in metrics and planned_prompts < 10_000:
        out.append(f"FID of {planned_prompts} pictures: fewer than the 10,000 that a claim needs.")
    return tuple(out)


def folder_notes(number, real, metrics, features):
    num_real = len(real) if hasattr(real, "shape") else "the reference's"
    first, *rest = notes(number, num_real, "", metrics, features)
    told = f"{number} pictures." + first[first.index(" In brackets") :].split(" Paired")[0]
    paired = " Paired figures are with the reference's picture of the same name."
    return (told + paired, *rest)
