"""The docs: the site builds without a warning, and what the pages show exists."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load_pipeline", "load_model", "attach", "word_condition", "make_mesh"):
        assert f".{name}" in api


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", text.split("\nnav:")[1]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:cnxs_jax|configs|docs|notebooks|tests|train|eval)/[\w./-]+)`", text)
    included = re.findall(r'--8<-- "([\w./-]+)', text)
    for name in (*named, *included):
        place = name.split(":")[0]
        assert (ROOT / place).exists() or place == "docs/results/checks.json", f"{page}: {name}"


def test_every_example_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    included = set(re.findall(r'--8<-- "([\w./-]+)', text))
    files = [p for p in (ROOT / "docs" / "examples").iterdir() if p.is_file()]
    assert files
    assert {str(p.relative_to(ROOT)) for p in files} <= included


def sections(text):
    """Texts from one heading to the next; a comment in a block of commands is no heading."""
    plain = re.sub(r"```.*?```", lambda block: block[0].replace("\n#", "\n "), text, flags=re.S)
    return re.split(r"^(?=#)", plain, flags=re.M)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_pictures_have_their_command(page):
    """In their own section, or on a page of results that the section names and that shows them."""
    results = ROOT / "docs" / "results"
    for section in sections(page.read_text(encoding="utf-8")):
        named = [results / name for name in re.findall(r"results/(\w+\.md)", section)]
        for picture in re.findall(r"!\[[^]]*\]\((?:\S+/)?(\S+)\)", section):
            shown = [
                part
                for other in named
                for part in sections(other.read_text(encoding="utf-8"))
                if picture in part
            ]
            assert any("```bash" in part for part in [section, *shown]), f"{page}: {picture}"
