"""The demo without its page: what comes in is limited, what goes out knows how it was made."""

import base64
import dataclasses
import io
import itertools
import json
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.demo import __main__ as demo
from cnxs_jax.demo import draw, guard, inputs
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import images
from cnxs_jax.pipelines.base import Result
from cnxs_jax.pipelines.pipeline import load_pipeline
from cnxs_jax.sample import DEFAULT_MODEL
from tests.pipelines import tiny

GOOD = {"prompt": "a red fox", "size": "16 x 16", "steps": 2}
RED, GREEN = "#e6194b", "#3cb44b"


def url(image, kind="PNG", **options):
    """A picture as the page sends it."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return data(file.getvalue(), kind.lower())


def data(content, kind="png"):
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def painting(phrases, size=(64, 48), boxes=()):
    """White, with boxes [(colour, (left, top, right, bottom))]."""
    image = Image.new("RGB", size, "white")
    for colour, box in boxes:
        image.paste(colour, box)
    return {"picture": url(image), "phrases": phrases}


def bomb(width, height):
    """The first bytes of a PNG that promises a large picture."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunk = b"\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


class Fake:
    """Answers at once with the seed's colour, and remembers what it was asked."""

    multiple, controllers, styled = 4, (), False

    def __init__(self, steps=20, guidance=4.5):
        self.asked, self.own = [], (steps, guidance)

    def __call__(self, **call):
        self.asked.append(call)
        image = Image.new("RGB", (call["width"], call["height"]), (call["seed"] % 256, 0, 0))
        known = {"prompt": call["prompt"], "seed": call["seed"]}
        return Result([image], [known | {"steps": call["num_inference_steps"]}])

    def defaults(self):
        return self.own

    def sizes(self, height, width):
        height, width = height or 16, width or 16
        if height % self.multiple or width % self.multiple:
            raise ConfigError("no multiple", "size")
        return (height, width), (height, width)


def controlled():
    fake = Fake()
    fake.controllers = ("a controller",)
    return fake


@pytest.fixture
def fake():
    return draw.studio(["fake"], [Fake()])


def form(**fields):
    return inputs.Form(**{**GOOD, **fields})


# --- what comes in ---------------------------------------------------------------------------

HOSTILE = {
    "empty": {"prompt": "  "},
    "long": {"prompt": "a" * 2001},
    "very long": {"prompt": "a b " * 500_000},
    "long negative": {"negative_prompt": "b" * 2001},
    "no text": {"prompt": {"a": 1}},
    "number": {"prompt": 5},
    "half a character": {"prompt": "fox \ud800"},
    "list": {"negative_prompt": ["b"]},
    "no size": {"size": None},
    "own size": {"size": "8192 x 8192"},
    "size list": {"size": ["16 x 16"]},
    "odd size": {"size": "17 x 16"},
    "no steps": {"steps": 0},
    "many steps": {"steps": 51},
    "half steps": {"steps": 2.5},
    "nan steps": {"steps": float("nan")},
    "infinite steps": {"steps": float("inf")},
    "true steps": {"steps": True},
    "text steps": {"steps": "20"},
    "nan guidance": {"guidance": float("nan")},
    "guidance": {"guidance": 20.1},
    "negative guidance": {"guidance": -1},
    "huge guidance": {"guidance": 10**400},
    "seed": {"seed": -1},
    "large seed": {"seed": 2**32},
    "none seed": {"seed": None},
    "strength": {"strength": 1e9},
    "painting list": {"painting": [1, 2]},
    "painting text": {"painting": "data:image/png;base64,"},
    "painting number": {"painting": {"picture": 7}},
    "address": {"painting": {"picture": "http://127.0.0.1:1/x.png"}},
    "file": {"painting": {"picture": "file:///etc/passwd"}},
    "path": {"painting": {"picture": "/etc/passwd"}},
    "svg": {"painting": {"picture": "data:image/svg+xml;base64,PHN2Zy8+"}},
    "not base64": {"painting": {"picture": "data:image/png;base64,?!?!"}},
    "half base64": {"painting": {"picture": "data:image/png;base64,AAAAA"}},
    "not ascii": {"painting": {"picture": "data:image/png;base64,ÄÄÄÄ"}},
    "nothing": {"painting": {"picture": data(b"")}},
    "html": {"painting": {"picture": data(b"<html>")}},
    "bomb": {"painting": {"picture": data(bomb(30_000, 30_000))}},
    "larger bomb": {"painting": {"picture": data(bomb(2**31 - 1, 2**31 - 1))}},
    "wide": {"painting": {"picture": data(bomb(2**22 + 1, 1))}},
    "cut": {"painting": {"picture": data(bomb(64, 64))}},
    "zero": {"painting": {"picture": data(bomb(0, 0))}},
    "bytes": {"painting": {"picture": data(b"\0" * (inputs.MAX_BYTES + 3))}},
    "postscript": {"painting": {"picture": data(b"%!PS-Adobe-3.0 EPSF-3.0\n")}},
    "phrases list": {"painting": {"picture": None, "phrases": ["a"]}},
    "other colour": {"painting": {"phrases": {"#000000": "fox"}}},
    "phrase number": {"painting": painting({RED: 3}, boxes=[(RED, (0, 0, 9, 9))])},
    "long phrase": {"painting": painting({RED: "a" * 2001})},
    "unpainted": {"painting": painting({RED: "fox"})},
    "no picture": {"painting": {"picture": None, "phrases": {RED: "fox"}}},
    "unnamed": {"painting": painting({}, boxes=[(RED, (0, 0, 9, 9))])},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_forms_are_refused_before_anything_is_drawn(fake, fields):
    with pytest.raises(ConfigError) as caught:
        list(draw.draw(fake, form(**fields)))
    assert caught.value.where
    assert len(str(caught.value)) < 2300  # the prompt may stand in it, nothing longer
    assert not fake.teacher.asked
    assert not fake.programs


def test_large_pictures_are_refused_before_they_are_decoded(monkeypatch):
    """These are whole, so that only the limits can refuse them."""
    side = int(inputs.MAX_PIXELS**0.5)
    fits, large = (url(Image.new("L", (side, side + n))) for n in (0, 1))
    assert inputs.picture({"picture": fits}, "x").size == (side, side)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    heavy = url(Image.fromarray(noise))
    monkeypatch.setattr(inputs, "_plain", None)  # decodes
    with pytest.raises(ConfigError, match="pixels, at most"):
        inputs.picture({"picture": large}, "x")
    monkeypatch.setattr(inputs.base64, "b64decode", None)
    with pytest.raises(ConfigError, match="more than 4194304 bytes"):
        inputs.picture({"picture": heavy}, "x")


CONTROL = {"no number": {"control_scale": "1"}, "scale": {"control_scale": 2.1},
           "hint": {"hint": "depth"}, "hint list": {"hint": []},
           "picture": {"control": {"picture": data(bomb(30_000, 30_000))}}}  # fmt: skip


@pytest.mark.parametrize("fields", CONTROL.values(), ids=CONTROL.keys())
def test_hostile_control_is_refused(fields):
    studio = draw.studio(["fake"], [controlled()])
    with pytest.raises(ConfigError):
        list(draw.draw(studio, form(**fields)))
    assert not studio.teacher.asked


def test_what_the_page_sends_passes(fake):
    """Whole numbers as floats, nothing painted, empty fields."""
    sent = form(steps=2.0, seed=7.0, guidance=3, negative_prompt=None, painting=None)
    (drawn,) = draw.draw(fake, sent)
    (asked,) = fake.teacher.asked
    assert (asked["num_inference_steps"], asked["seed"]) == (2, 7)
    assert asked["negative_prompt"] is None  # "" would take the learned caption's place
    assert asked["word_masks"] is None
    assert drawn.image.getpixel((0, 0)) == (7, 0, 0)


def test_pictures_are_turned_put_on_white_and_lose_their_metadata():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 1, 1))
    clear = np.asarray(inputs.picture({"picture": url(image)}, "x"))
    assert clear[0, 0].tolist() == [0, 0, 255]
    assert (clear[1] == 255).all()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"  # a quarter turn
    photo = url(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    turned = inputs.picture({"picture": photo}, "x")
    assert turned.size == (20, 40)
    assert not turned.info
    assert not turned.getexif()
    for mode in ("L", "P", "1", "LA", "I;16"):
        assert inputs.picture({"picture": url(Image.new(mode, (3, 2)))}, "x").size == (3, 2)


# --- painting and control --------------------------------------------------------------------


def test_masks_land_where_they_were_painted():
    boxes = [(RED, (0, 0, 32, 48)), (GREEN, (48, 24, 64, 48))]
    found = inputs.word_masks(painting({RED: " fox ", GREEN: "a crab"}, boxes=boxes), 3.0)
    assert set(found) == {"fox", "a crab"}
    fox, crab = found["fox"][0], found["a crab"][0]
    assert fox.shape == (48, 64)
    assert (fox[:, :32] == 1).all()
    assert not fox[:, 32:].any()
    assert crab.sum() == 16 * 24
    assert (crab[24:, 48:] == 1).all()
    assert found["fox"][1] == 3.0


def test_one_phrase_in_two_colours_and_a_large_painting():
    boxes = [(RED, (0, 0, 500, 1000)), (GREEN, (1000, 0, 2000, 1000))]
    sent = painting({RED: "fox", GREEN: "fox"}, size=(2000, 1000), boxes=boxes)
    ((mask, _),) = inputs.word_masks(sent, 1.0).values()
    assert mask.shape == (256, 512)
    np.testing.assert_allclose([mask[:, :128].mean(), mask[:, 128:256].mean()], [1, 0])
    np.testing.assert_allclose(mask[:, 256:].mean(), 1)


def test_blended_edges_belong_to_no_third_colour():
    """A brush blends a colour with white and with other colours."""
    colours = [np.array(Image.new("RGB", (1, 1), c).getpixel((0, 0))) for c in inputs.COLOURS]
    grounds = [*colours, np.full(3, 255)]
    for one in colours:
        for other in grounds:
            for share in np.linspace(0, 1, 21):
                pixel = np.round(share * one + (1 - share) * other)
                near = [c for c in colours if np.abs(pixel - c).max() <= 48]
                assert all((c == one).all() or (c == other).all() for c in near)


def test_style_pictures_reach_the_model_and_are_noted():
    """The shipped cascade: another picture of the same noise, which says so."""
    studio = draw.studio(["ediffi_tiny"], [load_pipeline(DEFAULT_MODEL.parent / "ediffi_tiny")])
    form = {"prompt": "a tiger", "size": "64 x 64", "steps": 2, "guidance": 3.0}
    red = {"picture": url(Image.new("RGB", (40, 64), "red"))}
    plain, styled, weighted = (
        next(draw.draw(studio, inputs.Form(**form, **more)))
        for more in ({}, {"style": red}, {"style": red, "style_scale": 4.0})
    )
    assert "style" not in plain.parameters
    assert styled.parameters["style"] is weighted.parameters["style"] is True
    assert (styled.parameters["style_scale"], weighted.parameters["style_scale"]) == (None, 4.0)
    pictures = [np.asarray(drawn.image, np.float32) for drawn in (plain, styled, weighted)]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).mean() > 1
    for wrong in ({"picture": bomb(30_000, 30_000)}, {"picture": "file:///etc/passwd"}, 7):
        with pytest.raises(ConfigError):
            draw.arguments(studio, inputs.Form(**form, style=wrong))


def test_control_pictures_reach_the_controller_as_they_were_drawn():
    """Straight lines stay; of a filled box Canny leaves the outline, where the box was."""
    studio = draw.studio(["fake"], [controlled()])
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (16, 16, 48, 48))
    for hint in (inputs.AS_IT_IS, "canny"):
        list(draw.draw(studio, form(control={"picture": url(image)}, hint=hint)))
    plain, canny = (np.asarray(asked["image"]) for asked in studio.teacher.asked)
    assert plain.shape == canny.shape == (16, 16, 3)
    assert (plain[5:11, 5:11] > 240).all()
    assert (plain[:3] < 16).all()
    assert set(np.unique(canny)) == {0, 255}
    edges = canny[..., 0] > 0
    assert not edges[6:10, 6:10].any()  # inside
    assert not edges[:3].any()
    assert all(edges[3:5, n].any() and edges[11:13, n].any() for n in range(5, 11))
    with_none = list(draw.draw(studio, form()))
    assert studio.teacher.asked[-1]["image"] is None  # the library says what is missing
    assert "hint" in with_none[0].parameters


# --- what goes out ---------------------------------------------------------------------------


def test_teacher_and_student_with_their_own_steps():
    told = []
    studio = draw.studio(["big", "small"], [Fake(), Fake(4, 0.0)])
    assert studio.defaults == [(20, 4.5), (4, 0.0)]
    sent = form(steps=9, student_steps=3, guidance=5.0, seed=1)
    found = list(draw.draw(studio, sent, lambda share, text: told.append((share, text))))
    assert [d.role for d in found] == ["teacher", "student"]
    assert [d.parameters["model"] for d in found] == ["big", "small"]
    teacher, student = (model.pipe.asked[0] for model in studio.models)
    assert (teacher["num_inference_steps"], teacher["guidance_scale"]) == (9, 5.0)
    assert (student["num_inference_steps"], student["guidance_scale"]) == (3, None)
    assert teacher["seed"] == student["seed"]
    assert [share for share, _ in told] == [0.0, 0.0, 0.5]
    assert "teacher: 9 steps" in told[1][1]


class Slow(Fake):
    def __call__(self, **call):
        time.sleep(0.4)
        return super().__call__(**call)


def test_progress_while_one_model_works(monkeypatch):
    """The first two pictures have nothing to go by: the first one's time was the compiler's."""
    monkeypatch.setattr(draw, "TICK", 0.05)
    studio = draw.studio(["big", "small"], [Slow(), Slow(4, 0.0)])
    for n in range(3):
        told = []
        if n == 2:  # what the second picture took, on a machine that nothing else held up
            studio.programs.update(dict.fromkeys(studio.programs, 0.4))
        list(draw.draw(studio, form(seed=n), lambda share, text, told=told: told.append(share)))
        assert told == sorted(told)
        assert (len(set(told)) > 4) == (n == 2), told
    assert max(share for share in told if share < 0.5) > 0.25
    assert 0.75 < told[-1] < 1


def test_what_goes_wrong_while_drawing_comes_out():
    with pytest.raises(ZeroDivisionError):
        draw.watched(lambda: 1 / 0, lambda seconds: None)


def test_models_that_do_not_go_together():
    larger = Fake()
    larger.sizes = lambda height, width: _only(20, height or 20, width or 20)
    with pytest.raises(ConfigError, match="no size in common"):
        draw.studio(["a", "b"], [Fake(), larger])
    with pytest.raises(ConfigError, match="only one of them"):
        draw.studio(["a", "b"], [Fake(), controlled()])


def _only(side, height, width):
    if (height, width) != (side, side):
        raise ConfigError("another size", "size")
    return (side, side), (side, side)


def test_first_pictures_say_so_and_programs_are_bounded(fake, monkeypatch):
    cleared = []
    monkeypatch.setattr(draw.jax, "clear_caches", lambda: cleared.append(True))
    assert [next(draw.draw(fake, form(seed=n))).compiled for n in range(3)] == [True, False, False]
    assert next(draw.draw(fake, form(guidance=3.0))).compiled
    assert not next(draw.draw(fake, form(guidance=7.0))).compiled
    for size in fake.sizes:
        for steps in range(1, 51):
            list(draw.draw(fake, form(steps=steps, size=size)))
    assert len(fake.programs) <= draw.MAX_PROGRAMS
    assert len(cleared) == 152 // draw.MAX_PROGRAMS


def test_a_refused_call_is_not_taken_for_compiled(fake):
    teacher, refused = fake.teacher, form(prompt="refuse")
    fake = dataclasses.replace(fake, models=(fake.models[0]._replace(pipe=_refusing(teacher)),))
    with pytest.raises(ConfigError, match="not in the prompt"):
        list(draw.draw(fake, refused))
    assert next(draw.draw(fake, form())).compiled


def _refusing(fake):
    class Refusing(Fake):
        def __call__(self, **call):
            if call["prompt"] == "refuse":
                raise ConfigError("the phrase is not in the prompt", "word_masks")
            return fake(**call)

    return Refusing()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("tokenizer"))


def test_a_real_pipeline_draws_and_its_file_says_how(pipe):
    studio = draw.studio(["tiny"], [pipe])
    assert list(studio.sizes)[0] == "16 x 16"
    assert studio.sizes["12 x 16"] == (16, 12)  # width x height of (height, width)
    boxes = [(RED, (0, 0, 32, 48))]
    sent = form(painting=painting({RED: "red fox"}, boxes=boxes), guidance=3.0, seed=5)
    (drawn,) = draw.draw(studio, sent)
    stored = images.read_parameters(io.BytesIO(images.png_bytes(drawn.image, drawn.parameters)))
    assert stored == json.loads(json.dumps(drawn.parameters))
    wanted = {"prompt": "a red fox", "seed": 5, "steps": 2, "guidance": 3.0, "height": 16,
              "painted": {"red fox": 1.3}, "model": "tiny"}  # fmt: skip
    assert stored.items() >= wanted.items()
    assert "/" not in json.dumps(stored)  # no path of the machine
    (plain,) = draw.draw(studio, form(guidance=3.0, seed=5))
    assert np.abs(np.asarray(plain.image, int) - np.asarray(drawn.image, int)).max() > 0
    assert "painted" not in plain.parameters
    with pytest.raises(ConfigError, match="is not in the prompt"):
        list(draw.draw(studio, form(painting=painting({RED: "owl"}, boxes=boxes))))


# --- what the server lets in -----------------------------------------------------------------

HERE = {"host": "127.0.0.1:7860"}
REFUSED = [
    ("/", {}, 403), ("/", {"host": "example.org"}, 403), ("/", {"host": "127.0.0.1.org"}, 403),
    ("/gradio_api/upload", HERE, 404), ("/gradio_api/file=/etc/passwd", HERE, 404),
    ("/gradio_api/component_server", HERE, 404), ("/gradio_api/queue/join/x", HERE, 404),
    ("/gradio_api/queue/join", HERE | {"content-length": str(guard.MAX_BODY + 1)}, 413),
    ("/gradio_api/queue/join", HERE | {"content-length": "9" * 5000}, 413),
    ("/gradio_api/queue/join", HERE | {"content-length": "-1"}, 413),
    ("/", HERE, None), ("/", {"host": "localhost"}, None), ("/assets/x.js", HERE, None),
    ("/gradio_api/queue/join", HERE | {"content-length": str(guard.MAX_BODY)}, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "headers", "status"), REFUSED)
def test_what_the_server_lets_in(path, headers, status):
    assert guard.refusal(path, headers) == status


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--port=0"], ["--port=x"], ["--port=65536"], ["--hub"],
                                       ["--host=0.0.0.0"], ["stray"]])  # fmt: skip
def test_bad_arguments(arguments):
    with pytest.raises(ConfigError) as caught:
        demo.parse(arguments)
    assert caught.value.code == 2
    assert caught.value.where


def test_a_missing_extra_is_one_message(tmp_path):
    """Gradio is hidden, so that this holds where it is installed, too."""
    hide = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'gradio' else find(name, *a)\n"
        "from cnxs_jax.errors import run_main; from cnxs_jax.demo.__main__ import main\n"
        "try: run_main(main, [])\n"
        "finally: print(sorted({'jax', 'numpy', 'gradio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 2
    message = done.stderr.splitlines()
    assert message[0].startswith("error: the page needs gradio")
    assert "pip install" in message[1]
    assert len(message) == 2
    assert done.stdout.strip() == "[]"
