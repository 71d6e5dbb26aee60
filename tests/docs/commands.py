"""The shell commands and Python blocks that the documents show, in their order."""

import pathlib
import re
import shlex

import yaml

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = (
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "cnxs_jax" / "assets").rglob("README.md")),
)
EXAMPLES = ("docs/examples/xpk.sh", "docs/examples/train.slurm")
JOBSET = "docs/examples/jobset.yaml"


def fenced(path):
    """[(language, text)] of a page's code blocks, in their order."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def jobset():
    """The JobSet example as a dict."""
    return yaml.safe_load((ROOT / JOBSET).read_text(encoding="utf-8"))


def container():
    """The container of the JobSet example."""
    job = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


def split(text):
    """Commands of a script as argument lists: one a line or between `&&`, without comments."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append([w for w in words[:end]])
            words = words[end + 1 :]
    return [words for words in found if words]


def shown(path):
    """Every command of a page."""
    found = [split(text) for language, text in fenced(path) if language == "bash"]
    return [words for block in found for words in block if not words[0].startswith("--8<--")]


def module_of(words):
    """("train", arguments) of `python -m train ...`, else (None, words)."""
    names = [pathlib.Path(w).name for w in words]
    for i in range(len(words) - 2):
        if re.fullmatch(r"python[\d.]*", names[i]) and words[i + 1] == "-m":
            return words[i + 2], words[i + 3 :]
    return None, words
