"""Networks that slow tests need trained, and that are not shipped.

`CNXS_CONTROLLER` names the `export/controlnet` of a run of `configs/pixart_control.py`. Without it
one is trained first: a quarter of an hour on two CPU cores.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def controller(folder):
    """Directory of a ControlNet-Transformer on the shipped PixArt that follows lines."""
    given = os.environ.get("CNXS_CONTROLLER")
    if given:
        return pathlib.Path(given).absolute()
    workdir = pathlib.Path(folder) / "control"
    command = [sys.executable, "-m", "train", "--config=configs/pixart_control.py"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir / "export" / "controlnet"
