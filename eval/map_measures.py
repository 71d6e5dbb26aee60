"""Metrics of maps: edges, depth and masks, of two folders of maps or of what a controller drew.

`measures.METRICS` names them; each is `(sample, pair, real, tools) -> {column: figure}`.
"""

import numpy as np

from cnxs_jax.control import hints
from cnxs_jax.errors import DataError
from eval.metrics import bootstrap, depth, edges, masks, scene_maps

EDGE_TOLERANCE = 1.0  # px


def edge_maps(sample, pair, real, tools):
    drawn, asked = _maps(sample) > 127, _maps(pair, "--reference") > 127
    both = drawn.any((1, 2)) & asked.any((1, 2))  # without an edge there is no distance
    found = edges.figures(drawn, asked, EDGE_TOLERANCE)
    if both.any():
        found["hausdorff_px"] = bootstrap.mean(edges.hausdorff(drawn[both], asked[both]))
    return found


def soft_edge_maps(sample, pair, real, tools):
    distance = edges.soft_edge_distance(_maps(sample) / 255.0, _maps(pair, "--reference") / 255.0)
    return {"soft_edge_distance": bootstrap.mean(distance)}


def depth_maps(sample, pair, real, tools):
    drawn, asked = _maps(sample) / 255.0, _maps(pair, "--reference") / 255.0
    error = depth.depth_error(drawn, asked)
    aligned = depth.depth_error(drawn, asked, align="scale_shift")
    order = depth.order_accuracy(drawn, asked)
    found = {"depth_mse": bootstrap.mean(error["mse"]), "depth_mae": bootstrap.mean(error["mae"])}
    found["depth_rmse_aligned"] = bootstrap.mean(aligned["rmse"])
    if np.isfinite(order).any():
        found["depth_order"] = bootstrap.mean(order[np.isfinite(order)])
    return found


def mask_maps(sample, pair, real, tools):
    return {
        "mask_iou": bootstrap.mean(
            masks.mask_iou(_maps(sample) > 127, _maps(pair, "--reference") > 127)
        )
    }


def control_edges(sample, pair, real, tools):
    """One detector on what was drawn and on the scenes that the control pictures were made of."""
    drawn, asked = (scene_maps.edges(i) for i in (sample.images, sample.prompts.images))
    return {f"control_{k}": v for k, v in edges.figures(drawn, asked, EDGE_TOLERANCE).items()}


def control_masks(sample, pair, real, tools):
    """What is drawn that is no background, against all objects' exact masks."""
    drawn, asked = scene_maps.foreground(sample.images), sample.prompts.truth["foreground"]
    return {"control_mask_iou": bootstrap.mean(masks.mask_iou(drawn, asked))}


def control_depth(sample, pair, real, tools):
    """Ranks of the fitted sprites against the exact ones, in parts of the nearest rank."""
    asked = sample.prompts.truth["depth"].astype(np.float64)
    drawn = tools.depth_reader()(sample.images, asked)
    error = depth.depth_error(drawn / hints.NEAREST, asked / hints.NEAREST)
    order = depth.order_accuracy(drawn, asked)
    found = {f"control_depth_{k}": bootstrap.mean(error[k]) for k in ("mse", "mae")}
    if np.isfinite(order).any():
        found["control_depth_order"] = bootstrap.mean(order[np.isfinite(order)])
    return found


def control_hed(sample, pair, real, tools):
    """HED's soft edges of what was drawn, against those of the scenes that were asked for."""
    distance = tools.hed_distance(sample.images, sample.prompts.images)
    return {"control_hed_distance": bootstrap.mean(distance)}


def _maps(sample, where="--images"):
    """Grey values `[N, H, W]` of pictures of maps.

    Raises DataError for coloured pictures: what they would be compared by is no map.
    """
    images = sample.images
    if np.any(images != images[..., :1]):
        number = int(np.argmax((images != images[..., :1]).any((1, 2, 3))))
        raise DataError(
            f"picture {number} is coloured, a map is grey",
            where,
            "give folders of maps; edges of photographs are compared by --metrics=hed",
        )
    return images[..., 0].astype(np.float64)
