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
INLINE = r"([A-Z_]+=\S+ )*(python -m \S+|pip install|playwright|ssh|hf) \S"


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


def steps(path):
    """[("bash", words) or ("python", text)] of a page in their order; what stands in a line last.

    What is included from a file is not: a card is a page of its own.
    """
    found = []
    for language, text in fenced(path):
        if text.startswith("--8<--"):
            continue
        if language == "bash":
            found += [("bash", words) for words in split(text)]
        if language == "python":
            found.append(("python", text))
    return found + [("bash", words) for words in inline(path)]


def inline(path):
    """Commands within the text of a page that are more than a name."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    code = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    code = [c for c in code if re.match(INLINE, c)]
    return [words for one in code for words in split(one) if "..." not in words]


def shown(path):
    """Every command of a page."""
    return [step for kind, step in steps(path) if kind == "bash"]


def inside(name):
    """The command that every host runs, of an example for a cluster."""
    if name == JOBSET:
        return container()["command"]
    words = split((ROOT / name).read_text(encoding="utf-8"))[-1]
    carried = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    return carried[0].split() if carried else words[1:] if words[0] == "srun" else words


def module_of(words):
    """("train", arguments) of `python -m train ...`, else (None, words)."""
    names = [pathlib.Path(w).name for w in words]
    for i in range(len(words) - 2):
        if re.fullmatch(r"python[\d.]*", names[i]) and words[i + 1] == "-m":
            return words[i + 2], words[i + 3 :]
    return None, words
