"""Which connections matter: what is lost when those of one resolution are cut.

A connection from controller to base ends in a zero convolution; cutting it sets that one back to
zero. The sampling noise, prompts and control pictures are those of the uncut controller.
"""

import re

import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.control import Controller
from eval import ask
from eval.metrics import bootstrap, edges, scene_maps

OUT = re.compile(r"(control_to_base_for_conv_in|(\w+_(?:blocks|connections)_\d+|mid_block)/"
                 r"ctrl_to_base\w*)/(kernel|bias)")  # fmt: skip


def groups(params):
    """{name: paths of its zero convolutions}: input, levels of encoder and decoder, middle."""
    found = {}
    for path in trees.flatten(params):
        match = OUT.fullmatch(path)
        if match:
            name = match[2] or "conv_in"
            found.setdefault(name, []).append(path)
    if not found:
        raise ConfigError("no connections to the base", "controller", "it must be a ControlNet-XS")
    return found


def cut(params, paths):
    """`params` with the arrays at `paths` zero."""
    return trees.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path in paths else leaf, params
    )


def edge_f1(pipe, prompts, seed, scale):
    """F1 of each picture's edges against those of the scenes, [N]."""
    images = ask.draw(
        pipe, prompts.captions, seed, image=list(prompts.truth["hint"] / np.float32(255.0)),
        guidance_scale=scale[1], num_inference_steps=scale[0],
    )  # fmt: skip
    drawn, asked = (scene_maps.edges(i) for i in (images, prompts.images))
    return edges.edge_f1(drawn, asked, 1.0)["f1"], images


def study(pipe, prompts, seed=0, scale=(20, 3.0)):
    """Rows: everything, each group cut, each group alone.

    Args:
        pipe: a pipeline with one ControlNet-XS.
        prompts: `plan.Prompts` with truth.
        scale: (steps, guidance scale).
    """
    (controller,) = pipe.controllers
    parts = groups(controller.params)
    every = {path for paths in parts.values() for path in paths}
    whole, images = edge_f1(pipe, prompts, seed, scale)
    rows = [{"connections": "all", "edge F1": bootstrap.mean(whole)}]
    shown = {"control picture": prompts.truth["hint"][:8], "scene": prompts.images[:8]}
    shown["all"] = images[:8]
    for name, paths in parts.items():
        line = {"connections": name}
        for column, gone in (("cut", set(paths)), ("alone", every - set(paths))):
            module = Controller(controller.module, cut(controller.params, gone), controller.compat)
            f1, images = edge_f1(pipe.replace(control=module), prompts, seed, scale)
            line[f"edge F1, {column}"] = bootstrap.mean(f1)
            if column == "cut":
                line["lost"] = bootstrap.mean(whole - f1)
                shown[f"without {name}"] = images[:8]
        rows.append(line)
    return {"rows": rows}, {"prompts": prompts.captions[:8], "images": shown}
