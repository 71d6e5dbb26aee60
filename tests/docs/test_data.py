"""The JSON files that tables quote: links to `docs/results/data/` resolve, every file is linked."""

import json
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"
LINK = re.compile(r"\]\(\s*<?([^)\s>#]+)|^\[[^\]]+\]:\s*<?([^\s>#]+)", re.MULTILINE)


def links(docs):
    """{file below `results/data` of a folder of documents: pages that link it}."""
    data, found = (docs / "results" / "data").resolve(), {}
    for page in docs.rglob("*.md"):
        for pair in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / "".join(pair)).resolve()
            if data in target.parents:
                found.setdefault(target, []).append(page)
    return found


def mistakes(docs):
    """What is wrong with the data of a folder of documents, one sentence a file."""
    results, linked, said = docs / "results", links(docs), []
    files = [p.resolve() for p in (results / "data").rglob("*") if p.is_file()]
    for file in (p for p in files if not p.name.startswith(".")):
        if not any(results in page.parents for page in linked.get(file, [])):
            said.append(f"{file.name} is linked by no page of results")
        try:
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                said.append(f"{file.name} is no JSON object")
        except ValueError:
            said.append(f"{file.name} is no JSON")
    for target, pages in linked.items():
        if target not in files:
            said.append(f"{pages[0].name} links {target.name}, which is not there")
    return sorted(said)


def test_the_data_of_the_results():
    assert not mistakes(DOCS)


def test_what_is_missing_or_linked_by_nobody_is_found(tmp_path):
    data = tmp_path / "results" / "data"
    data.mkdir(parents=True)
    (data / ".gitkeep").write_text("")
    for name in ("linked", "named", "orphan", "elsewhere"):
        (data / f"{name}.json").write_text("{}")
    (data / "list.json").write_text("[]")
    (data / "cut.json").write_text('{"rows": [')
    page = "[a](data/linked.json) [b][n] [c](data/gone.json#x) [d](https://x.org/data/y.json)\n"
    page += "[e](data/list.json), [f](data/cut.json), `data/orphan.json`\n\n[n]: data/named.json\n"
    (tmp_path / "results" / "page.md").write_text(page)
    (tmp_path / "start.md").write_text("[a](results/data/elsewhere.json)")
    assert mistakes(tmp_path) == [
        "cut.json is no JSON",
        "elsewhere.json is linked by no page of results",
        "list.json is no JSON object",
        "orphan.json is linked by no page of results",
        "page.md links gone.json, which is not there",
    ]
