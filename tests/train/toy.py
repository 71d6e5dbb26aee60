"""A task small enough to train in a second: a two-layer denoiser of random pictures."""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion import schedule
from train import objectives, validate
from train.loop import Task

KEYS = {
    "build": {
        "toy": {
            "width": validate.integer(1),
            "bad_step": validate.integer(-1),
            "reads": validate.Optional(validate.text),
            "export_seconds": validate.Optional(validate.number(0)),
            "parent": validate.Optional(validate.text),
            "experts": validate.Optional(validate.integer(1)),
        }
    }
}


class Loader:
    """Batches that depend on their position alone."""

    def __init__(self, batch_size, bad_step=-1):
        self.batch_size, self.position, self.bad_step = batch_size, 0, bad_step

    def __next__(self):
        rng = np.random.default_rng(self.position)
        self.position += 1
        x = rng.standard_normal((self.batch_size, 4, 4, 2)).astype(np.float32)
        if self.position == self.bad_step:
            x[0, 0, 0, 0] = np.nan
        hint = rng.standard_normal((self.batch_size, 4)).astype(np.float32)
        share = self.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return {"x": x[mine], "hint": hint[mine], "caption": ["a"] * share}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def init(key, width=32):
    """{"attn1", "ff"}: named like a DiT so that its rules apply."""
    keys = jax.random.split(key, 3)

    def dense(key, n_in, n_out):
        kernel = jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in)
        return {"kernel": kernel, "bias": jnp.zeros(n_out)}

    return {
        "ff": {"net_0": {"proj": dense(keys[0], 37, width)}, "net_2": dense(keys[1], width, 32)},
        "gain": jnp.ones(()),
    }


def denoise(params, x, t, cond):
    """x [B,4,4,2] -> [B,4,4,2]."""
    flat = x.reshape(x.shape[0], -1)
    h = jnp.concatenate([flat, t[:, None] / 1000.0, cond["hint"]], axis=1)
    first, last = params["ff"]["net_0"]["proj"], params["ff"]["net_2"]
    h = jnp.tanh(h @ first["kernel"] + first["bias"][None])
    return params["gain"] * (h @ last["kernel"] + last["bias"][None]).reshape(x.shape)


def encode(encoders, raw, key):
    return {"x": raw["x"], "cond": {"hint": raw["hint"]}}


def build(config):
    """A task; `toy.reads` must be there already, `toy.export_seconds` delays the export."""
    if config.toy.get("reads"):
        assert pathlib.Path(config.toy.reads).is_file(), config.toy.reads

    def export(ema, frozen, encoders, path):
        time.sleep(config.toy.get("export_seconds") or 0)
        np.savez(path / "params.npz", gain=np.asarray(ema["gain"]))

    objective = objectives.denoise(denoise, schedule.linear())
    return Task(
        objective=objective,
        params=lambda key: init(key, config.toy.width),
        loader=Loader(config.batch_size, config.toy.bad_step),
        encode=encode,
        export=export,
        parent=config.toy.get("parent"),
        experts=config.toy.get("experts"),
    )


def config(**changes):
    """A ConfigDict of a run of 20 steps."""
    from ml_collections import ConfigDict

    values = {
        "task": "tests.train.toy:build",
        "seed": 0,
        "steps": 20,
        "batch_size": 16,
        "grad_accum": 1,
        "ema_decay": 0.9,
        "log_every": 1,
        "save_every": 5,
        "sample_every": 1000,
        "mesh": {"data": -1, "fsdp": 1},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "toy": {"width": 32, "bad_step": -1},
    }
    return ConfigDict({**values, **changes})


def stages():
    """Two runs of which the second reads what the first exports, slowly."""
    from ml_collections import ConfigDict

    first = config(steps=5, toy={"width": 32, "bad_step": -1, "export_seconds": 3.0})
    second = config(steps=5)
    second.toy.reads = "{workdir}/first/export/params.npz"
    return ConfigDict({"stages": ("first", "second"), "first": first, "second": second})


def get_config(variant=""):
    return stages() if variant == "stages" else config()
