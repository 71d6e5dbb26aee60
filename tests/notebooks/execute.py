"""Runs a notebook's cells in one process: `python execute.py NOTEBOOK OUT NAME=JSON ...`.

The values replace those of cells tagged "parameters". OUT receives what a reader would see:
`output.json` with one entry a code cell ({"text", "picture"}), and the pictures as PNG.
"""

import ast
import contextlib
import io
import json
import pathlib
import sys


def run(source, namespace):
    """The value of the cell's last expression, or None; statements before it are executed."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = ast.Module(tree.body[:-1] if last else tree.body, [])
    exec(compile(body, "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) if last else None


def main(notebook, out, *values):
    given = {name: json.loads(value) for name, value in (v.split("=", 1) for v in values)}
    cells = json.loads(pathlib.Path(notebook).read_text(encoding="utf-8"))["cells"]
    out, seen, namespace = pathlib.Path(out).absolute(), [], {"__name__": "__main__"}
    out.mkdir(parents=True, exist_ok=True)
    for n, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            value = run("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", ()):
                namespace.update({k: v for k, v in given.items() if k in namespace})
        picture = None
        if hasattr(value, "save"):
            picture = f"cell_{n:02d}.png"
            value.save(out / picture)
        seen.append({"text": text.getvalue(), "picture": picture})
    unknown = [name for name in given if name not in namespace]
    assert not unknown, f"no such parameters: {unknown}"
    (out / "output.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
