"""Controllers of a pipeline: opening them, their pictures, scales, and where they act.

A controller is any adapter of `cnxs_jax.control`: the pipeline asks it for `hint_kind` ("latents":
the VAE encodes the picture; anything else: the picture itself in [0, 1]) and `hint_factor` (hint
pixels a latent) and knows no class by name.
"""

import dataclasses
import functools
import math
import numbers
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import control, tree
from cnxs_jax.convert import controlnet_xs_fused, families, files, pixart_control
from cnxs_jax.data import pixels
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import images as pictures

LATENTS = "latents"


class Controller(NamedTuple):
    """An adapter, its parameters, and whose computation to follow (`control.attach`)."""

    module: Any
    params: Any
    compat: str = "official"


@dataclasses.dataclass(frozen=True)
class Control:
    """One call's control, checked.

    Attributes:
        pictures: for each controller its pictures: 1, one a prompt or one an image.
        scales: for each controller its `controlnet_conditioning_scale`.
        start, end: one number, or one a controller.
    """

    pictures: tuple
    scales: tuple
    start: Any
    end: Any

    @property
    def parameters(self):
        """What draws an image again, beside its picture."""
        return {
            "controlnet_conditioning_scale": list(self.scales),
            "control_guidance_start": self.start,
            "control_guidance_end": self.end,
        }

    def sides(self, height, width, multiple):
        """(H, W) asked for, or those of the first picture, rounded down to the multiple."""
        first = self.pictures[0][0]
        own = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        own = [max(side // multiple, 1) * multiple for side in own]
        return own[0] if height is None else height, own[1] if width is None else width


def open_controllers(given, dtype=None, compat="official", mesh=None, offload=None):
    """A tuple of `Controller`, none or more, on the device or the mesh; with `offload` on the host.

    Args:
        given: None; a directory or file of an adapter; a pair (module, params) or a `Controller`;
            or a list of these. Of files that hold a base, too, the controller is taken.
        compat: of adapters that do not say it themselves; only ControlNet-XS has the choice.

    Raises:
        ConfigError: something else.
        CheckpointError: files that are missing or damaged.
    """
    from cnxs_jax.pipelines.load import place

    def one(item):
        if isinstance(item, tuple):
            return of_pair(item, compat)
        if isinstance(item, str | os.PathLike):
            return read_controller(item, dtype, compat)
        raise ConfigError(
            f"expected the path of a controller or (module, params), got {type(item).__name__}",
            "control",
        )

    items = given if isinstance(given, list) else [] if given is None else [given]
    found = [one(item) for item in items]
    if offload is not None:
        return tuple(c._replace(params=jax.device_get(c.params)) for c in found)
    # `place` empties what it is given; the caller's own tree stays.
    return tuple(c._replace(params=place(jax.tree.map(lambda x: x, c.params), mesh)) for c in found)


def of_pair(pair, compat="official", where="control"):
    """The `Controller` of (module, params), or of one; `compat` is for a pair.

    Raises ConfigError for anything else, and for the parameters of another network.
    """
    kinds = [type(part).__name__ for part in pair]
    whole = len(pair) == 2 or isinstance(pair, Controller)
    if not whole or not isinstance(pair[0], nn.Module) or not isinstance(pair[1], dict):
        fix = "give a path, or what `load_model` returns; several controllers as a list"
        what = f"expected (module, params), got ({', '.join(kinds)})"
        raise ConfigError(what, where, fix)
    check_params(*pair[:2], where)
    if isinstance(pair, Controller):
        return pair
    return Controller(*pair, compat if has_choice(pair[0]) else "official")


def check_params(module, params, where="control"):
    """Raises ConfigError unless names and shapes are the module's; of unknown classes nothing."""
    if families.known_family(module) is None:
        return
    trees = (families.shapes(module), params)
    wanted, given = ({k: np.shape(v) for k, v in tree.flatten(one).items()} for one in trees)
    wrong = sorted(k for k in wanted | given if wanted.get(k) != given.get(k))
    if wrong:
        name, kind = wrong[0], type(module).__name__
        raise ConfigError(
            f"{len(wrong)} parameters do not fit the {kind}: {name} is "
            f"{given.get(name, 'missing')}, expected {wanted.get(name, 'none of this name')}",
            where,
            "give module and parameters of one network, as `load_model` returns them",
        )


def read_controller(path, dtype=None, compat="official"):
    """The `Controller` in a directory or file, its parameters on the host.

    Args:
        compat: of an adapter that lies on its own. One that is fused with its base is what
            diffusers computes that opens it.

    Raises ConfigError and CheckpointError as `load_model` does.
    """
    from cnxs_jax.pipelines import save_xs
    from cnxs_jax.pipelines.load import read_model

    if save_xs.is_fused(path):
        found = read_model(path, controlnet_xs_fused.CONTROL, dtype=dtype)
        return Controller(*found, save_xs.FUSED_COMPAT)
    joint = os.path.isfile(path) and pixart_control.is_joint(files.read_tensors(path))
    component = pixart_control.CONTROL if joint else None
    module, params = read_model(path, component, dtype=dtype)
    return Controller(module, params, compat if has_choice(module) else "official")


def has_choice(adapter):
    """Whether this kind of adapter has more than one reference (`Controller.compat`)."""
    return hasattr(adapter, "compat")


def compat_of(controllers, default):
    """Whose computation the first one follows that has the choice; `default` without any."""
    return next((c.compat for c in controllers if has_choice(c.module)), default)


def attach(base, controllers):
    """`(module, params)` of the network with its controllers."""
    if not controllers:
        return tuple(base)
    compat = controllers[0].compat
    if any(c.compat != compat for c in controllers):
        raise ConfigError("controllers of different compat", "control", "attach those of one kind")
    if len(controllers) == 1:
        return control.attach(*base, controllers[0].module, controllers[0].params, compat)
    modules, params = ([getattr(c, name) for c in controllers] for name in ("module", "params"))
    return control.attach(*base, modules, params, compat)


def check(controllers, image, scale, start, end, request):
    """The `Control` of a call; raises ConfigError for what the controllers could not use.

    Args:
        image: a picture or a list of them; of several controllers a list of these, one each. A
            picture is PIL (resized to what is drawn), or an array [H,W,3] or a batch of them,
            uint8 or float in [0, 1], in the size of the hint.
        scale, start, end: numbers, or lists with one a controller.
        request: how many texts and images there are.
    """
    count, prompts, batch = len(controllers), len(request.prompts), request.batch
    if image is None:
        raise ConfigError("the controller needs a control picture", "image", "give `image`")
    if count > 1 and (not isinstance(image, list | tuple) or len(image) != count):
        raise ConfigError(f"expected a list of {count}, one a controller", "image")
    sets = tuple(_pictures(one) for one in (image if count > 1 else [image]))
    for one in sets:
        if len(one) not in (1, prompts, batch):
            what = f"{len(one)} control pictures for {prompts} prompts and {batch} images"
            raise ConfigError(what, "image", "give one, one a prompt or one an image")
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    values = zip((scale, start, end), names, strict=True)
    scales, starts, ends = (_numbers(value, count, name) for value, name in values)
    if count == 1:
        return Control(sets, scales, starts[0], ends[0])
    return Control(sets, scales, list(starts), list(ends))


def condition(call, controllers, latent_size, pipe, request):
    """`hint` and `control_scale`: arrays, or tuples of them for several controllers.

    `pipe` runs its VAE where a controller reads latents.
    """
    hints, scales, batch, vae = [], [], request.batch, pipe.components["vae"]
    for own, scale, controller in zip(call.pictures, call.scales, controllers, strict=True):
        latents = getattr(controller.module, "hint_kind", None) == LATENTS
        factor = vae.module.downsample_factor if latents else controller.module.hint_factor
        hint = np.stack([_fitted(p, [side * factor for side in latent_size]) for p in own])
        hint = pipe.run(vae, encode_picture, hint) if latents else jnp.asarray(hint)
        hints.append(jnp.repeat(hint, _repeats(len(own), request), axis=0))
        scales.append(jnp.full((batch,), scale, jnp.float32))
    if len(controllers) == 1:
        return {"hint": hints[0], "control_scale": scales[0]}
    return {"hint": tuple(hints), "control_scale": tuple(scales)}


@functools.partial(jax.jit, static_argnames=("module",))
def encode_picture(module, params, images):
    """Scaled latents [B,h,w,C] of pictures [B,H,W,3] in [0,1]: the mean of the posterior."""
    mean, _ = module.apply({"params": params}, images * 2.0 - 1.0, method="encode")
    return (mean - (module.shift_factor or 0.0)) * module.scaling_factor


def _repeats(count, request):
    """How often each picture is used, images of one prompt being neighbours."""
    if count == 1:
        return request.batch
    return request.repeats if count == len(request.prompts) else 1


def _pictures(given):
    """A list of PIL pictures and float arrays [H,W,3]."""
    rows = list(given) if getattr(given, "ndim", 0) == 4 else given
    rows = list(rows) if isinstance(rows, list | tuple) else [rows]
    if not rows:
        raise ConfigError("the list of control pictures is empty", "image")
    found = []
    for row in rows:
        if hasattr(row, "convert"):
            found.append(pixels.rgb(row, "image"))
            continue
        try:
            found.append(pictures.to_array(row))
        except ConfigError as error:
            raise ConfigError(error.what, "image", error.fix) from None
    return found


def _fitted(picture, size):
    """float32 [H,W,3] in [0,1] of this size; PIL pictures are resized as diffusers does."""
    if not isinstance(picture, np.ndarray):
        from PIL import Image

        if (picture.height, picture.width) != tuple(size):
            picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return pictures.to_array(picture)
    if picture.shape[:2] != tuple(size):
        raise ConfigError(
            f"a control picture of {picture.shape[0]}x{picture.shape[1]}, expected "
            f"{size[0]}x{size[1]}",
            "image",
            "resize the array, or give a PIL picture, which is resized",
        )
    return picture


def _numbers(value, count, name):
    """`count` finite numbers of one number or a list."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    good = [isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values]
    if len(values) != count or not all(good) or not all(math.isfinite(v) for v in values):
        raise ConfigError(f"expected {count} finite number(s), got {value!r}", name)
    return tuple(float(v) for v in values)
