"""What the frozen encoders make of a batch, computed here or read from a cache.

`extract` is all that a cache stores; `latents` and `conditions` turn features into the batch of the
step. They draw from the same keys either way, so a cached run repeats the other one.
"""

import jax
import jax.numpy as jnp

from train.parts import drawn, picture_sizes, t5_text, to_signed


def extract(networks, encoders, raw, hint=None):
    """Features of a raw batch: moments, text and sizes, with `hint_*` of a control picture."""
    text = t5_text(networks.text, encoders["text_encoder"], raw)
    found = {**moments(networks, encoders, raw["image"]), **text}
    if hint is not None:
        control = moments(networks, encoders, hint(networks, encoders, raw))
        found |= {f"hint_{name}": value for name, value in control.items()}
    return {**found, **picture_sizes(raw)}


def moments(networks, encoders, image):
    """{"mean", "logvar"} of the VAE's posterior of pictures in 0..255."""
    params = {"params": encoders["vae"]}
    mean, logvar = networks.vae.apply(params, to_signed(image), method="encode")
    return {"mean": mean, "logvar": logvar}


def read(networks, encoders, raw, hint=None):
    """The features of a batch, which a cache gives as they are."""
    return raw if "mean" in raw else extract(networks, encoders, raw, hint)


def latents(networks, features, key, kind=""):
    """Scaled latents drawn from the posterior; `kind` "hint_": of the control picture."""
    return drawn(networks.vae, features[f"{kind}mean"], features[f"{kind}logvar"], key)


def encoders_of(networks, empty):
    """The argument `encoders` of `encode`: what is frozen, and the empty prompt of a cache."""
    found = {} if networks.null is None else {"null": networks.null}
    if networks.text_params is None:
        return {**found, "empty": empty}
    if networks.detector is not None:
        found["detector"] = networks.detector_params
    return {**found, "vae": networks.vae_params, "text_encoder": networks.text_params}


def empty_text(networks, encoders, empty):
    """`{"text" [1,L,D], "text_mask" [1,L]}` of the empty prompt.

    `empty` are its ids and mask; a cache has the text itself among the encoders.
    """
    if "empty" in encoders:
        return encoders["empty"]
    return t5_text(networks.text, encoders["text_encoder"], empty)


def drop_text(features, empty, rate, key):
    """Text and mask with a share `rate` of the captions replaced by the empty prompt's."""
    drop = jax.random.bernoulli(key, rate, (features["text"].shape[0], 1))
    text = jnp.where(drop[..., None], empty["text"], features["text"])
    return {"text": text, "text_mask": jnp.where(drop, empty["text_mask"], features["text_mask"])}


def micro(networks, features):
    """`size` and `aspect` where the network reads them."""
    if not networks.dit.micro_conditioning:
        return {}
    return {key: features[key] for key in ("size", "aspect")}
