"""What a release is made of agrees with itself."""

import pathlib
import re

import yaml

import cnxs_jax

ROOT = pathlib.Path(__file__).parents[2]


def test_the_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", cnxs_jax.__version__)
    for name in ("setup.py", "pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*version\s*[=:]\s*['\"\d]", text, re.MULTILINE), name
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == cnxs_jax.__version__


def test_citation():
    """The keys that version 1.2.0 of the format requires, and papers with an address each."""
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["license"] == "Apache-2.0"
    links = [reference["url"] for reference in content["references"]]
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link) for link in links)
    assert "https://arxiv.org/abs/2401.05252" in links


def test_a_card_beside_every_shipped_model():
    assets = ROOT / "cnxs_jax" / "assets"
    for model in (p for p in assets.iterdir() if p.is_dir()):
        card = (model / "README.md").read_text(encoding="utf-8")
        for word in ("```bash", "Licence:", "LICENSE-DATA", "**Not for**"):
            assert word in card, f"{model.name}: {word}"


def test_a_cards_numbers_of_parameters_are_those_of_its_files():
    from cnxs_jax.convert.files import read_tensors

    assets = ROOT / "cnxs_jax" / "assets"
    for model in (p for p in assets.iterdir() if p.is_dir()):
        card = (model / "README.md").read_text(encoding="utf-8")
        for file in model.rglob("*.safetensors"):
            number = sum(tensor.size for tensor in read_tensors(file).values())
            assert f"{number:,}" in card, f"{file}: {number:,}"


def test_the_cards_words_are_the_worlds():
    from cnxs_jax.data import emoji_scenes

    card = (ROOT / "cnxs_jax" / "assets" / "pixart_tiny" / "README.md").read_text(encoding="utf-8")
    world = emoji_scenes.world()
    things = re.search(r"- Things: (.*?)\.\n", card, re.DOTALL)[1]
    assert sorted(re.split(r",\s+", things)) == sorted(world.concepts)
    for word in (*world.styles, *world.backgrounds):
        assert word in card
