"""From a form to pictures: what models can do, and drawing with each of them. Needs no gradio."""

import concurrent.futures
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax

from cnxs_jax import __version__
from cnxs_jax.demo import inputs
from cnxs_jax.errors import ConfigError

ROLES = {1: ("model",), 2: ("teacher", "student")}  # by their number
# Steps and size make a program each; so many are kept, or a page would fill the memory.
MAX_PROGRAMS = 32
TICK = 0.2  # seconds between two words about a picture that is being drawn


class Model(NamedTuple):
    """A loaded pipeline, its part on the page, and the name that its pictures carry (no path)."""

    role: str
    name: str
    pipe: Any


class Drawn(NamedTuple):
    """A picture, what draws it again, its time, and whether that includes compiling a program."""

    role: str
    image: Any
    parameters: dict
    seconds: float
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Studio:
    """The models of a page.

    `programs` holds what was drawn before and is compiled, with the seconds that the last picture
    took, or None where that one waited for the compiler.
    """

    models: tuple
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def teacher(self):
        """The first pipeline: it says what the page offers."""
        return self.models[0].pipe

    @property
    def controlled(self):
        """Whether a controller wants a picture."""
        return bool(self.teacher.controllers)

    @property
    def styled(self):
        """Whether a reference picture has a meaning."""
        return self.teacher.styled

    @property
    def defaults(self):
        """(steps, guidance scale) of each model."""
        return [model.pipe.defaults() for model in self.models]

    @property
    def sizes(self):
        """{label: (height, width)} that every model draws, the first model's own size first."""
        offered = _sizes(self.teacher)
        for model in self.models[1:]:
            offered = [size for size in offered if _draws(model.pipe, size)]
        if not offered:
            raise ConfigError(
                "they have no size in common", "--student", "give a student of --model"
            )
        return {f"{width} x {height}": (height, width) for height, width in offered}


def studio(names, pipes):
    """The `Studio` of one or two pipelines; raises ConfigError where they do not go together."""
    models = tuple(Model(*row) for row in zip(ROLES[len(pipes)], names, pipes, strict=True))
    made = Studio(models)
    wanted = {bool(model.pipe.controllers) for model in models}
    if len(wanted) > 1:
        raise ConfigError("only one of them has a controller", "--student", "give --control")
    if len(made.teacher.controllers) > 1:
        raise ConfigError("the page shows one controller", "--control")
    _ = made.sizes
    return made


def _sizes(pipe):
    """(height, width) that a pipeline draws: its own, and 4:3 where it is free to choose."""
    own, _ = pipe.sizes(None, None)
    short = max(own[0] * 3 // 4 // pipe.multiple, 1) * pipe.multiple
    wanted = [own, (short, own[1]), (own[0], short)]
    return [size for size in dict.fromkeys(wanted) if _draws(pipe, size)]


def _draws(pipe, size):
    try:
        pipe.sizes(*size)
    except ConfigError:
        return False
    return True


def arguments(studio, form):
    """The keyword arguments of each model's call, and what their pictures carry beside them.

    Raises:
        ConfigError: anything that is beyond the limits, before any device work.
    """
    prompt = inputs.text(form.prompt, "prompt")
    if not prompt:
        raise ConfigError("the prompt is empty", "prompt", "say what to draw")
    height, width = size = studio.sizes[inputs.choice(form.size, studio.sizes, "size")]
    steps = inputs.whole(form.steps, "steps", 1, inputs.MAX_STEPS)
    common = {
        "prompt": prompt,
        "negative_prompt": inputs.text(form.negative_prompt, "negative prompt") or None,
        "num_inference_steps": steps,
        "guidance_scale": inputs.number(form.guidance, "guidance", inputs.MAX_GUIDANCE),
        "height": height,
        "width": width,
        "seed": inputs.whole(form.seed, "seed", 0, 2**32 - 1),
        "word_masks": inputs.word_masks(form.painting, form.strength),
    }
    painted = common["word_masks"] or {}
    extra = {"painted": {p: weight for p, (_, weight) in painted.items()}} if painted else {}
    if studio.controlled:
        scale = inputs.number(form.control_scale, "control scale", inputs.MAX_CONTROL_SCALE)
        common |= {"image": hint(form, size), "controlnet_conditioning_scale": scale}
        extra["hint"] = form.hint
    if studio.styled:
        style = _style(form)
        common |= style
        extra |= {"style": True} if style else {}
    calls = [common]
    if len(studio.models) > 1:  # guided by its own default: a student has its guidance inside
        steps = inputs.whole(form.student_steps, "student's steps", 1, inputs.MAX_STEPS)
        calls.append(common | {"num_inference_steps": steps, "guidance_scale": None})
    return calls, extra


def hint(form, size):
    """The control picture of a form as the controller is shown it; None without one."""
    image = inputs.picture(form.control, "control picture")
    kind = inputs.choice(form.hint, inputs.HINTS, "hint")
    return None if image is None else inputs.hint(image, kind, size)


def _style(form):
    image = inputs.picture(form.style, "style picture")
    scale = inputs.number(form.style_scale, "style scale", inputs.MAX_STYLE_SCALE)
    return {} if image is None else {"style_image": image, "style_scale": scale or None}


def draw(studio, form, tell=lambda share, text: None):
    """Yields a `Drawn` of each model in turn.

    Args:
        tell: called with the share of the work that is done and with what goes on. The loop over
            the steps is one program and says nothing, so that the share within a model is the
            time since its start over the time that its last picture of this kind took.

    Raises:
        ConfigError: a form that is refused. NumericsError: the networks' output is not finite.
    """
    tell(0.0, "reading the form")
    calls, extra = arguments(studio, form)
    for done, (model, call) in enumerate(zip(studio.models, calls, strict=True)):
        program = _program(model, call)
        compiled = _room_for(studio.programs, program)
        expected = studio.programs.get(program)
        about = f", about {expected:.1f} s" if expected else ""
        what = f"{model.role}: {call['num_inference_steps']} steps"
        what += ", the first time with compiling" if compiled else about

        def now(seconds, done=done, expected=expected, what=what):
            part = min(seconds / expected, 0.95) if expected else 0.0
            tell((done + part) / len(calls), f"{what}; {seconds:.1f} s so far")

        result, seconds = watched(functools.partial(model.pipe, **call), now)
        studio.programs[program] = None if compiled else seconds
        known = {"model": model.name, "version": __version__}
        parameters = {**result.parameters[0], **extra, **known}
        yield Drawn(model.role, result.images[0], parameters, seconds, compiled)


def watched(work, tell):
    """(result, seconds) of `work()` in another thread; meanwhile `tell(seconds)`, at least once."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        while True:
            tell(time.perf_counter() - start)
            if concurrent.futures.wait([running], timeout=TICK).done:
                return running.result(), time.perf_counter() - start


def _program(model, call):
    """What a call's compiled program depends on."""
    guided = (call["guidance_scale"] or 0.0) > 1
    size, steps = (call["height"], call["width"]), call["num_inference_steps"]
    painted, styled = call["word_masks"] is not None, call.get("style_scale")
    return (model.role, size, steps, guided, painted, "style_image" in call, styled is None)


def _room_for(programs, program):
    """Whether this program is to be compiled first; forgets all of them at `MAX_PROGRAMS`."""
    if program in programs:
        return False
    if len(programs) >= MAX_PROGRAMS:
        programs.clear()
        jax.clear_caches()
    return True
