"""The page on a real server: in headless Chromium, and under requests that no browser sends.

    pip install -e ".[test-core,demo]" playwright
    python -m pytest -m slow tests/demo

Chromium is Debian's (`chromium`) or Playwright's own (`python -m playwright install chromium`).
`CNXS_STUDENT` may name a student's directory for the page of two models; it is the shipped model
otherwise.
"""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import math
import os
import pathlib
import shutil
import statistics
import time

import numpy as np
import pytest
from PIL import Image

from cnxs_jax import sample
from cnxs_jax.control import hints
from cnxs_jax.demo import inputs
from cnxs_jax.demo.guard import MAX_BODY, QUEUE
from cnxs_jax.pipelines import images
from eval.metrics.edges import edge_f1
from tests.checks import record
from tests.demo.client import ROOT, Server
from tests.demo.test_draw import HOSTILE, RED, bomb, data, painting

pytestmark = pytest.mark.slow
PICTURES = ROOT / "docs" / "results" / "pictures"
PROMPT = "a frog and a crab on a white background"
FROG_AND_CRAB = {RED: "frog", "#4363d8": "crab"}
SECRETS = ("Traceback", "site-packages", ".py", str(ROOT), str(pathlib.Path.home()), "/tmp")
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")


def fields(prompt="a frog", negative="", size="64 x 64", steps=1, guidance=0, seed=0,
           painted=None, strength=1.3):  # fmt: skip
    return [prompt, negative, size, steps, guidance, seed, painted, strength]


def pixels(source):
    """int [H,W,3] and the parameters of a picture's data URL."""
    content = base64.b64decode(source.split(",", 1)[1])
    parameters = images.read_parameters(io.BytesIO(content))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), int), parameters


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Teacher and student with the shipped controller, which follows lines."""
    folder = tmp_path_factory.mktemp("pair")
    student = pathlib.Path(os.environ.get("CNXS_STUDENT", sample.DEFAULT_MODEL)).absolute()
    made = Server(folder, f"--student={student}", f"--control={sample.LINES}")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=own, args=list(CHROMIUM))
        yield opened
        opened.close()


@contextlib.contextmanager
def opened(browser, server):
    """The loaded page; afterwards: it spoke to this server alone, and nothing was forbidden."""
    hosts, complaints = set(), []
    page = browser.new_page(viewport={"width": 1180, "height": 1040})
    page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if "://" in r.url else None)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.goto(server.address, timeout=120_000)
    page.locator("#prompt textarea").wait_for(timeout=120_000)
    yield page
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert not complaints
    page.close()


def draw(page, count, of="#gallery"):
    """Presses the button; the sources of the gallery's pictures, newest first."""
    page.locator("#draw").click()
    page.wait_for_function(f"document.querySelectorAll('{of} img').length == {count}",
                           timeout=300_000)  # fmt: skip
    return [image.get_attribute("src") for image in page.locator(f"{of} img").all()]


def drag(page, canvas, points):
    """Strokes with the mouse; points are shares of the canvas's sides."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for n, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if n == 0:
            page.mouse.down()
    page.mouse.up()


def show(page, name):
    """A screenshot for the docs, in 128 colours: 256 would be twice as large."""
    shot = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    shot.convert("RGB").quantize(128).save(PICTURES / f"{name}.png", optimize=True)


def test_a_prompt_gives_a_picture_that_knows_its_parameters(server, browser):
    with opened(browser, server) as page:
        page.locator("#prompt textarea").fill(PROMPT)
        (source,) = draw(page, 1)
        picture, parameters = pixels(source)
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 20
        wanted = {"prompt": PROMPT, "steps": 20, "guidance": 4.5, "seed": 0, "model": "pixart_tiny"}
        assert parameters.items() >= wanted.items()
        page.locator("#gallery summary").click()
        assert PROMPT in page.locator("#gallery pre").inner_text()
        assert "20 steps" in page.locator("#now figcaption").inner_text()
        page.locator("#prompt textarea").fill("")
        page.locator("#draw").click()
        page.get_by_text("the prompt is empty").wait_for(timeout=60_000)
        assert page.locator("#gallery img").count() == 1


def test_a_painted_phrase_lands_where_it_was_painted(server, browser):
    """The frog is green, the crab is red: green minus red tells which half has the frog."""
    with opened(browser, server) as page:
        page.locator("#prompt textarea").fill(PROMPT)
        page.locator("#paint button").first.click()
        canvas = page.locator("#painting canvas")
        page.locator("#painting input[type=range]").fill("128")
        names = page.locator("#painting input[type=text]")
        for name, phrase, x in ((0, "frog", 0.2), (2, "crab", 0.8)):
            names.nth(name).fill(phrase)
            drag(page, canvas, [(x, 0.0), (x, 1.0)])
        (source,) = draw(page, 1)
        page.evaluate("scrollTo(0, 0)")
        show(page, "demo_page")
    picture, parameters = pixels(source)
    assert parameters["painted"] == {"frog": 1.3, "crab": 1.3}
    swapped = [(RED, (32, 0, 64, 64)), ("#4363d8", (0, 0, 32, 64))]
    other = painting(FROG_AND_CRAB, size=(64, 64), boxes=swapped)
    answer = server.ask(fields(PROMPT, steps=20, guidance=4.5, painted=other))
    frog_left, frog_right = _greener_left(picture), _greener_left(pixels(answer[2][0]["src"])[0])
    record("demo: a painted phrase", frog_left=frog_left, frog_right=frog_right)
    assert frog_left > 20
    assert frog_right < -20


def _greener_left(picture):
    """Mean of green minus red on the left half less that on the right."""
    green = picture[..., 1] - picture[..., 0]
    return round(float(green[:, :32].mean() - green[:, 32:].mean()), 1)


def ring(x, y, radius=0.24):
    """Points of a circle, in shares of the canvas's sides."""
    turns = [2 * math.pi * n / 24 for n in range(25)]
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def drawn_hint(page, points):
    """Draws on the empty control canvas; what the page says that the controller sees."""
    page.locator("#control .clear").click()
    page.wait_for_function("!document.querySelector('#hint img')", timeout=60_000)
    drag(page, page.locator("#control canvas"), points)
    page.locator("#hint img").wait_for(timeout=60_000)
    return pixels(page.locator("#hint img").get_attribute("src"))[0]


def share_found(picture, hint):
    """Share of a hint's lines that have an edge of the picture within two pixels."""
    edges = hints.canny(picture[None].astype(np.uint8))[..., 0] > 0
    return round(float(edge_f1(edges, hint[None].max(-1) > 128, tolerance=2)["recall"][0]), 2)


def test_a_drawn_control_changes_the_pictures_and_their_edges_follow(pair, browser):
    """Two rings, the same prompt and noise: each picture has the edges of its own ring.

    They lie where the model has seen things of this size: the scenes have a grid of 8 px.
    """
    places = ((0.25, 0.25), (0.625, 0.625))
    shown, found = [], []
    with opened(browser, pair) as page:
        page.locator("#prompt textarea").fill("a basketball on a white background")
        page.get_by_label("number input for Student's steps").fill("4")
        for n, place in enumerate(places):
            shown.append(drawn_hint(page, ring(*place)))
            found.append([pixels(source) for source in draw(page, 2 * (n + 1))[:2]])
        captions = [one.inner_text() for one in page.locator("#now figcaption").all()]
        page.evaluate("scrollTo(0, 0)")
        place = page.locator("#hint img").bounding_box()
        below = math.ceil(place["y"] + place["height"]) + 24
        page.set_viewport_size({"width": 1180, "height": below})
        show(page, "demo_control")
    for hint, (x, y) in zip(shown, places, strict=True):  # as it was drawn: where, how wide, thin
        rows, columns = np.nonzero(hint.max(-1) > 128)
        assert abs((rows.min() + rows.max()) / 2 - 64 * y) < 3
        assert abs((columns.min() + columns.max()) / 2 - 64 * x) < 3
        assert 26 <= np.ptp(rows) <= 36
        assert len(rows) < 64 * 64 / 12
    assert captions[0].startswith("teacher: 20 steps")
    assert captions[1].startswith("student: 4 steps")
    assert [p["steps"] for row in found for _, p in row] == [20, 4, 20, 4]
    for n, role in enumerate(("teacher", "student")):
        one, two = (row[n][0] for row in found)
        assert np.abs(one - two).mean() > 5  # another control, another picture
        own = (share_found(one, shown[0]), share_found(two, shown[1]))
        other = (share_found(one, shown[1]), share_found(two, shown[0]))
        record(f"demo: lines found again, {role}", own=own, other=other)
        assert min(own) > 0.7, (role, own, other)
        assert max(other) < min(own) - 0.3, (role, own, other)


# --- requests that no browser sends ----------------------------------------------------------


def hostile():
    """{name: data}: forms that the library refuses, and others that are none."""
    good = dict(zip(NAMES, fields(), strict=True))
    forms = {name: list((good | _as_json(form)).values()) for name, form in HOSTILE.items()}
    path = {"path": "/etc/passwd"}
    odd = {"no fields": [], "one field": ["a"], "too many": fields() * 50, "nulls": [None] * 8,
           "lists": [[[[]]]] * 8, "paths": [path] * 8,
           "files": [path | {"meta": {"_type": "gradio.FileData"}}] * 8}  # fmt: skip
    return forms | odd


NAMES = ("prompt", "negative_prompt", "size", "steps", "guidance", "seed", "painting", "strength")


# Gradio makes texts and whole numbers of these, and drops fields that are too many.
COERCED = {"no text", "number", "list", "half steps", "too many"}


def _as_json(form):
    """A form of `test_draw` as JSON can say it."""
    plain = {name: str(v) if isinstance(v, float) and v != v else v for name, v in form.items()}
    return {name: 1e308 if value == float("inf") else value for name, value in plain.items()}


def test_hostile_requests_are_answered_and_nothing_of_the_server_is_told(server):
    assert len(server.ask(fields())[2]) == 1
    forms, slowest, memory = hostile(), 0.0, []
    assert len(forms) >= 40
    for _ in range(24):
        for name, form in forms.items():
            start = time.monotonic()
            status, warnings, pictures, text = server.ask(form)
            slowest = max(slowest, time.monotonic() - start)
            if name in COERCED and pictures:
                assert pixels(pictures[0]["src"])[0].shape == (64, 64, 3), name
                continue
            assert not pictures, name
            assert status != 200 or warnings or '"success":false' in text, name
            assert not [word for word in SECRETS if word in text], name
            assert all(len(warning) < 2000 for warning in warnings), name
        memory.append(server.memory())
    # What the first rounds bring in (decoders, buffers) stays; one round has 20 MiB of noise.
    grown = statistics.median(memory[-3:]) - statistics.median(memory[3:6])
    assert len(server.ask(fields())[2]) == 1
    record("demo: hostile requests", requests=19 * len(forms), grown_mib=round(grown, 1),
           slowest_s=round(slowest, 2))  # fmt: skip
    assert grown < 60  # 200 where gradio keeps the last inputs of every session
    assert slowest < 20


def test_memory_is_flat_over_many_pictures(server):
    for n in range(20):
        server.ask(fields(seed=n))
    before = server.memory()
    for n in range(200):
        assert len(server.ask(fields(seed=n))[2]) == 1
    grown = server.memory() - before
    record("demo: 200 pictures", grown_mib=round(grown, 1))
    assert grown < 40


def test_the_bar_moves_while_one_model_works(server):
    """The third picture of a kind: its time is known, and the loop itself says nothing."""
    for n in range(3):
        text = server.ask(fields(steps=50, guidance=4.5, seed=n))[3]
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    units = [unit for e in events if e["msg"] == "progress" for unit in e["progress_data"]]
    shares = [unit["progress"] for unit in units]
    record("demo: progress within a picture", told=len(shares), last=round(shares[-1], 2))
    assert shares == sorted(shares)
    assert len({share for share in shares if 0 < share < 1}) >= 2
    assert "50 steps, about" in units[-1]["desc"]


def test_fifty_at_once(server):
    """The queue takes what it holds, refuses the rest, and goes on."""
    server.ask(fields(steps=20))  # compiles
    before = server.memory()
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda n: server.ask(fields(steps=20, seed=n)), range(50)))
    drawn = [pixels(pictures[0]["src"])[1]["seed"] for _, _, pictures, _ in answers if pictures]
    refused = [status for status, _, pictures, _ in answers if not pictures]
    grown = round(server.memory() - before, 1)
    record("demo: fifty at once", drawn=len(drawn), refused=len(refused), grown_mib=grown)
    assert grown < 100
    assert QUEUE <= len(drawn) <= QUEUE + 5  # as one is drawn, another one comes in
    assert len(set(drawn)) == len(drawn)
    assert set(refused) <= {503}
    assert len(server.ask(fields())[2]) == 1


CLOSED = ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd",
          "/gradio_api/component_server", "/gradio_api/call/draw", "/gradio_api/run/draw",
          "/gradio_api/proxy=http://127.0.0.1/", "/monitoring", "/gradio_api/stream/x",
          "/static/../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd"]  # fmt: skip


def test_only_the_page_is_served(server):
    for path in CLOSED:
        for method in ("GET", "POST"):
            status, text = server.request(method, path, "{}" if method == "POST" else None)
            assert status in (400, 403, 404, 405), path
            assert "root:" not in text, path
    assert server.request("GET", "/", headers={"Host": "example.org"})[0] == 403
    assert server.request("GET", "/", headers={"Host": f"localhost:{server.port}"})[0] == 200
    long = {"Content-Length": str(MAX_BODY + 1), "Content-Type": "application/json"}
    assert server.request("POST", "/gradio_api/queue/join", "", long)[0] == 413
    for path in ("/", "/config", "/gradio_api/info"):
        text = server.request("GET", path)[1]
        assert not [word for word in (str(ROOT), str(pathlib.Path.home())) if word in text], path


def test_a_body_of_unknown_length_is_cut_off(server):
    before = server.memory()
    chunks = (b" " * 2**20 for _ in range(200))
    kind = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    with contextlib.suppress(OSError, http.client.HTTPException):  # the server hangs up
        server.request("POST", "/gradio_api/queue/join", chunks, kind)
    assert server.memory() - before < 3 * MAX_BODY / 2**20
    assert server.request("GET", "/config")[0] == 200


def test_a_bomb_is_refused_at_once(server):
    """The header is looked at, nothing is decoded."""
    real = Image.new("L", (20_000, 20_000))
    file = io.BytesIO()
    real.save(file, "PNG", compress_level=9)
    assert len(file.getvalue()) < inputs.MAX_BYTES
    before = server.memory()
    for content in (file.getvalue(), bomb(60_000, 60_000)):
        form = fields(painted={"picture": data(content), "phrases": {RED: "frog"}})
        _, (warning,), _, _ = server.ask(form)
        assert "[painting]" in warning
    assert server.memory() - before < 100


def test_the_log_has_no_prompt(server):
    server.ask(fields("a secret frog", size="nowhere"))
    server.ask(fields("a secret frog", steps=0))
    assert "secret" not in server.log
