"""The evaluation: makes each row's pictures once, measures them all, writes the report.

The heart is independent of models: `evaluate(make, plan, ...)` takes any `make(row, prompts) ->
uint8 [N, H, W, 3]`. Three callers make a `Plan` (`eval.plan`) for it: `main` from a run, `pipeline`
from a pipeline directory, `folders` from two folders of pictures.
"""

import dataclasses
import itertools
from pathlib import Path

import jax

import cnxs_jax
from cnxs_jax import precision
from cnxs_jax.errors import ConfigError, DataError
from eval import draw, folders, measures, networks, plan, recipe, report, show
from eval.plan import Plan

REAL_SEED = 1  # the real scenes that distributions are compared with; prompts come from seed 0
ROWS = "eval_rows"  # the directory of the pictures
LEAST = {"num_prompts": 1, "num_real": 1, "batch_size": 1, "size": 1, "seed": 0}  # of Options


@dataclasses.dataclass(frozen=True)
class Options:
    """What all evaluations may be told; the flags of `python -m eval` of the same names.

    Attributes:
        metrics: of `measures.METRICS`; None: those of `measures.USUAL` that the plan can have.
        weights: {network: path}.
        features: the network of fd, kid, mmd and prdc.
        num_prompts, num_real: pictures a row, and real ones.
        batch_size: pictures drawn at once; by default what all prompt sets fill, up to 64.
        reference: folder of real pictures or `.npz` of statistics, instead of scenes.
        prompts: file or folder of prompts, instead of scenes.
        size: side that pictures of folders are cut to, px.
        seed: of noise and scenes.
        redraw: draw pictures that were made with other settings again.
        alone: the end of a training run: only this process of several evaluates, and what needs
            a package that is not installed is "not run".
    """

    metrics: tuple | None = None
    weights: dict = dataclasses.field(default_factory=dict)
    features: str = "efflite0"
    num_prompts: int = 512
    num_real: int = 2000
    batch_size: int | None = None
    reference: str | None = None
    prompts: str | None = None
    size: int | None = None
    seed: int = 0
    redraw: bool = False
    alone: bool = False

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more", f"--{name}")
        networks.check_features(self.features)
        if self.metrics is not None:
            object.__setattr__(self, "metrics", measures.check(self.metrics))
            measures.check_weights(self.metrics, self.weights, self.features, self.alone)

    def tools(self):
        """The networks, none of them opened yet."""
        return networks.Tools(self.weights, self.features)

    @property
    def held_out(self):
        """Prompts of each held-out split."""
        return max(self.num_prompts // 4, 1)


def evaluate(make, planned, tools, metrics=measures.USUAL):
    """Measures all rows.

    Args:
        make: `make(row, prompts) -> uint8 images`, such as a `draw.Gallery`.
        planned: `plan.Plan`.
        tools: `networks.Tools`.
        metrics: of `measures.METRICS`.

    Returns:
        list of report rows; those of `planned.ceilings` come first.
    """
    metrics, real = measures.check(metrics), planned.real
    if "test" not in planned.sets or (hasattr(real, "shape") and not len(real)):
        raise DataError("an evaluation needs a test set and some real pictures", "eval")
    measures.check_needs(metrics, planned.has)
    if hasattr(real, "shape"):
        real = measures.Sample(real, None, tools)
    table = []
    for name, change in planned.ceilings.items():
        own = _sample({s: change(p.images) for s, p in planned.sets.items()}, planned.sets, tools)
        line = {"method": name, "steps": None, "evaluations": None}
        table.append(line | measures.figures(metrics, own, None, real, tools))
    pair = None
    if planned.pairs is not None:
        pair = measures.Sample(planned.pairs, None, tools)
    for row in planned.rows:
        made = {split: make(row, p) for split, p in planned.sets.items()}
        sample = _sample(made, planned.sets, tools)
        if planned.has["pairs"]:
            pair = pair or sample  # the first row is the reference of those after it
        table.append(planned.line(row) | measures.figures(metrics, sample, pair, real, tools))
    return table


def _sample(images, sets, tools):
    """The Sample of the test prompts, with those of the other splits."""
    samples = {s: measures.Sample(images[s], p, tools) for s, p in sets.items()}
    test = samples.pop("test")
    test.splits = samples
    return test


def finish(planned, gallery, options, out, *, metrics=None, matmul=None, summary=None,
           number=None):  # fmt: skip
    """Draws, measures and writes: the path of the report, None in processes other than the first.

    `metrics` are those of a plan where none are asked for; else the usual ones that it can have.
    `number` of pictures a row, where it is not that of the captions.
    Of several processes, unless `options.alone`, each draws its share into a directory that all of
    them see; the first one draws what is missing then, and measures.
    """
    metrics = options.metrics or metrics or measures.usual(planned.has)
    measures.check_needs(metrics, planned.has)
    number = len(planned.sets["test"].captions) if number is None else number
    measures.check_numbers(metrics, number, len(planned.real) if planned.has["real"] else None)
    several = jax.process_count() > 1 and not options.alone
    shared = several and isinstance(gallery, draw.Gallery)
    path = None
    with precision.matmul(matmul):
        if shared:
            for row, prompts in itertools.product(planned.rows, planned.sets.values()):
                gallery.draw_share(row, prompts, jax.process_index(), jax.process_count())
            _wait_for_all("all pictures are drawn")
        if options.alone or jax.process_index() == 0:
            table = evaluate(gallery, planned, options.tools(), metrics)
            path = show.write(out, table, planned, gallery, summary)
            print(report.table(table))
            print(path)
    if several:
        _wait_for_all("the report is written")  # a process that leaves early ends the cluster
    return path


def _wait_for_all(what):
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"eval: {what}")


def scene_sets(world, size, options, metrics, *hint):
    """{split: Prompts}: test prompts, and the held-out splits where something reads them."""
    numbers = {"test": options.num_prompts}
    if metrics is None or "scene_accuracy" in metrics:
        numbers |= dict.fromkeys(("heldout_pairs", "heldout_relations"), options.held_out)
    return {s: plan.prompts(world, s, n, options.seed, size, *hint) for s, n in numbers.items()}


def references(options, world=None, size=None):
    """What distributions are compared with: `--reference`, or fresh scenes, or None."""
    if options.reference:
        return folders.reference(options.reference, options.size)
    if world is None:
        return None
    real_seed = options.seed + REAL_SEED
    return plan.prompts(world, "test", options.num_real, real_seed, size).images


def main(config, workdir, *, steps=(1, 2, 4, 8), reference_steps=50,
         solvers=tuple(plan.SCHEDULERS), guidance_scale=None, teacher=None, student=None, sweep=(),
         out=None, summary=None, **options):  # fmt: skip
    """Evaluates a run (see `python -m eval --help`) and returns the path of the report.

    Args:
        config: the run's; of one with `stages` the last stage is evaluated. Prompts and real scenes
            are those of its `data` (source, size, num_concepts), held out of training.
        workdir: the run's, the one that was given to training.
        sweep: [(key, values)] of `plan.parse_sweep`: the run's result (its student, if it has one)
            over these values, instead of the comparison with its teacher.
        out: directory of the report, `workdir`/eval by default. Training's own short report is the
            same call with fewer prompts and `out=workdir`.
        solvers: names in `plan.SCHEDULERS` for the teacher's rows.
        summary: figures to print below the tables, such as the training cost.
        options: of `Options`.

    Raises:
        ConfigError, DataError, CheckpointError: before any device work where possible.
    """
    options = Options(**options)
    out = Path(workdir) / "eval" if out is None else Path(out)
    places = recipe.directories(config, workdir, teacher, student)
    if sweep:
        place = places.get("student") or places["teacher"]
        return pipeline(place, out, options, sweep, _one(steps), guidance_scale, config=config,
                        workdir=workdir, summary=summary)  # fmt: skip
    if options.prompts or options.reference:
        fix = "compare pipelines with --pipeline=DIR, or sweep one with --sweep"
        raise ConfigError("the comparison with a teacher is on scenes", "--prompts", fix)
    config, _ = recipe.last_stage(config, workdir)
    metrics = options.metrics or measures.USUAL
    world, size = recipe.scenes_of(config, metrics)
    rows = plan.rows(steps, reference_steps, "student" in places, solvers)
    who = {name: draw.identity(path) for name, path in places.items()}
    measures.check_numbers(metrics, options.num_prompts, options.num_real)
    sets = scene_sets(world, size, options, metrics)
    guidance_scale = recipe.trained_scale(config) if guidance_scale is None else guidance_scale
    mesh = draw.local_mesh()
    pipes = {name: cnxs_jax.load_pipeline(path, mesh=mesh) for name, path in places.items()}
    batch = options.batch_size or min(options.held_out, 64)
    vae = pipes["teacher"].components["vae"]
    ceilings = {
        "real scenes": lambda images: images,
        "real scenes through the VAE": draw.round_trip(vae.module, vae.params, batch),
    }
    told = "the pipeline's default" if guidance_scale is None else f"{guidance_scale:g}"
    most = max(row.steps for row in rows)
    planned = Plan(
        "Evaluation", tuple(rows), sets, references(options, world, size), ceilings=ceilings,
        references=tuple(r.method for r in rows if r.steps == most), shown=show.shown_rows(rows),
        notes=show.notes(options.num_prompts, options.num_real, told, metrics, options.features),
    )  # fmt: skip
    generate = draw.pipeline_generator(pipes, guidance_scale, batch)
    settings = {"pipeline": who, "guidance_scale": guidance_scale}
    gallery = draw.Gallery(generate, out / ROWS, settings, options.seed, batch, options.redraw)
    matmul = config.get("matmul_precision")
    return finish(planned, gallery, options, out, matmul=matmul, summary=summary)


def _one(steps):
    """The steps of a pipeline's rows: one number, or None for its own."""
    if steps is None or len(steps) > 1:
        return None
    return steps[0]


def pipeline(directory, out, options, sweep=(), steps=None, guidance_scale=None, *, config=None,
             workdir=None, summary=None):  # fmt: skip
    """Evaluates one pipeline directory, at one setting or over a sweep; the path of the report.

    Args:
        directory: in diffusers' layout.
        out: directory of the report.
        options: `Options`; without `prompts` they come from the scenes of `config`'s data.
        sweep: [(key, values)] of `plan.parse_sweep`.
        steps, guidance_scale: where not swept; None: the pipeline's own.
    """
    digest = draw.identity(directory)
    sets, real, scenes, config = _prompts_of(options, config or {}, workdir)
    pipe = cnxs_jax.load_pipeline(directory, mesh=draw.local_mesh())
    check_size(pipe, sets["test"])
    usual = pipe.defaults()
    steps = usual[0] if steps is None else steps
    guidance_scale = usual[1] if guidance_scale is None else guidance_scale
    doubled = not pipe.guidance_is_input
    rows = tuple(plan.sweep_rows(sweep, steps, guidance_scale, doubled))
    keys = tuple(key for key, _ in sweep)
    metrics = options.metrics or measures.USUAL
    number = len(sets["test"].captions)
    told = "as in the table" if "guidance_scale" in keys else f"{guidance_scale:g}"
    num_real = len(real) if hasattr(real, "__len__") else "the reference's"
    batch = options.batch_size or min(number, 64)
    planned = Plan(
        f"Evaluation of {Path(directory).name}", rows, sets, real, axis=(*keys, "evaluations")[0],
        ceilings={"real scenes": lambda images: images} if scenes else {}, swept=keys,
        notes=show.notes(number, num_real, told, metrics, options.features),
    )  # fmt: skip
    generate = draw.pipeline_generator({"pipeline": pipe}, None, batch)
    settings = {"pipeline": digest}
    gallery = draw.Gallery(generate, out / ROWS, settings, options.seed, batch, options.redraw)
    matmul = config.get("matmul_precision")
    return finish(planned, gallery, options, out, matmul=matmul, summary=summary)


def _prompts_of(options, config, workdir):
    """(sets, real, whether they are scenes, config of the last stage)."""
    config, _ = recipe.last_stage(config, workdir or "")
    if options.prompts:
        test = folders.prompts(options.prompts, options.num_prompts, options.size)
        real = references(options)
        real = test.images if real is None else real
        return {"test": test}, real, False, config
    checked = set(recipe.CHECKED) & set(options.metrics or recipe.CHECKED)
    world, size = recipe.scenes_of(config, checked)
    real = references(options, world, size)
    return scene_sets(world, size, options, options.metrics), real, True, config


def check_size(pipe, test):
    """Refuses scenes of another size than the pipeline draws."""
    if test.images is None or test.facts is None:
        return
    drawn, asked = pipe.sizes(None, None)[0], test.images.shape[1:3]
    if drawn != asked:
        (h, w), (height, width) = drawn, asked
        raise ConfigError(
            f"the pipeline draws {w} x {h} pixels, the scenes have {width} x {height}",
            "--pipeline",
            "give prompts and real pictures: --prompts=FILE --reference=FOLDER",
        )


def folders_of_pictures(images, reference, out, options):
    """Evaluates the pictures of one folder against another's; the path of the report.

    Pictures of the same names are pairs. Maps (edges, depth, masks) are read as grey values.
    """
    if not reference:
        raise ConfigError("--images needs --reference", "--reference", measures.NEEDS["set"])
    paths = folders.paths_of(images, "--images")
    made = folders.read(paths, options.size)
    real, pairs = folders.reference(reference, options.size), None
    if hasattr(real, "shape"):
        found = folders.pairs(paths, folders.paths_of(reference, "--reference"))
        pairs = None if found is None else folders.read(found, options.size)
        if pairs is not None and pairs.shape != made.shape:
            what = f"pairs of different sizes: {made.shape[1:3]} and {pairs.shape[1:3]}"
            raise DataError(what, str(reference), "--size=256 cuts all to one size")
    captions = folders.captions_of(paths, images)
    row = plan.Row(Path(images).name, "images")
    metrics = options.metrics or measures.USUAL
    planned = Plan(
        f"{Path(images).name} against {Path(reference).name}", (row,),
        {"test": plan.Prompts("test", captions)}, real, pairs, maps=pairs is not None,
        notes=show.folder_notes(len(made), real, metrics, options.features),
    )  # fmt: skip
    return finish(planned, lambda row, prompts: made, options, out, number=len(made))
