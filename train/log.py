"""What a run tells (progress bar, metrics, TensorBoard, pictures) and what tells it to stop."""

import json
import math
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np

from cnxs_jax.errors import NumericsError
from cnxs_jax.storage import write_text


class Writer:
    """`metrics.jsonl`, TensorBoard events and `samples/*.png` in `workdir`.

    Lines after step `start` are dropped: a resumed run repeats those steps. Only the lead process
    writes.
    """

    def __init__(self, workdir, start=0, lead=True):
        self.workdir, self.lead = pathlib.Path(workdir), lead
        if not lead:
            return
        from tensorboardX import SummaryWriter

        path = self.workdir / "metrics.jsonl"
        kept = read_metrics(path, start)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(self.workdir), purge_step=start or None)

    def scalars(self, step, values):
        if not self.lead:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def image(self, step, image):
        """`image`: uint8 [H,W,3]."""
        if not self.lead:
            return
        from PIL import Image

        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / f"{step:08d}.png")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.lead:
            self.file.close()
            self.board.close()


def read_metrics(path, last=None):
    """The lines of a `metrics.jsonl` up to step `last`; a half-written one is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if last is None or line["step"] <= last:
            lines.append(line)
    return lines


class Progress:
    """Progress bar and metrics, one step behind the device so that it never waits for the host.

    `push` looks at the step before; `flush` at the newest. Both raise NumericsError on a step
    whose loss or gradient was not finite.
    """

    def __init__(self, config, start, writer):
        self.config, self.writer, self.pending = config, writer, None
        self.window, self.clock, self.last = [], time.perf_counter(), start
        self.start, self.bar = start, None

    def __enter__(self):
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.config.steps,
            initial=self.start,
            desc=self.config.get("name", "train"),
            disable=jax.process_index() != 0,
            mininterval=1.0,
            file=sys.stderr,
        )
        return self

    def __exit__(self, *_):
        self.bar.close()

    def push(self, step, metrics):
        previous, self.pending = self.pending, (step, metrics)
        self._take(previous)

    def flush(self):
        previous, self.pending = self.pending, None
        self._take(previous)

    def _take(self, item):
        if item is None:
            return
        step, metrics = item
        values = {k: np.asarray(v).item() for k, v in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            raise NumericsError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}; "
                "the parameters were not changed and nothing was saved",
                "train step",
                "lower optimizer.learning_rate, then go on from the last checkpoint with --resume",
            )
        self.window.append(values)
        self.bar.update(1)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._log(step)

    def _log(self, step):
        now = time.perf_counter()
        seconds = (now - self.clock) / (step - self.last)
        means = {k: math.fsum(v[k] for v in self.window) / len(self.window) for k in self.window[0]}
        rate = self.config.batch_size / seconds
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{rate:.0f}", refresh=False)
        self.writer.scalars(step, {**means, "images_per_second": rate})
        self.window, self.clock, self.last = [], now, step


class StopSignal:
    """SIGTERM and SIGINT ask for a save and an exit; a second one ends the process at once.

    In a notebook a second one ends the cell, for the process is the reader's whole session.

    With several processes the decision must fall at the same step everywhere, so JAX's own
    preemption notice is used there: SIGTERM alone, sent by the cluster.
    """

    def __init__(self):
        self.name, self._old = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self.name is not None:
            if "ipykernel" in sys.modules:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: saving, then stopping", file=sys.stderr, flush=True)

    def requested(self, step):
        """Whether to stop after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = self.name or "SIGTERM"
                return True
            return False
        return self.name is not None
