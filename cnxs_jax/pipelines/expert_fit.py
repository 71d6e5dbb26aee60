"""Whether the experts of a pipeline (`cnxs_jax.pipelines.experts`) fit it and each other."""

import numpy as np

from cnxs_jax.diffusion import schedule
from cnxs_jax.errors import ConfigError


def check(main, experts):
    """Raises ConfigError for experts that do not fit `main` or each other."""
    own = schedule.from_config(main.scheduler)
    times = [expert.below for expert in experts]
    for n, time in enumerate(times):
        if not 0 < time < own.num_train_timesteps:
            what = f"{time:g} is not between 0 and {own.num_train_timesteps}"
            raise ConfigError(what, "experts: below", "or one of the denoisers would never run")
        if time in times[:n]:
            raise ConfigError(f"two experts below {time:g}", "experts: below", "leave one out")
    for expert in experts:
        where = f"experts: below {expert.below:g}"
        pipe = expert.pipeline(main)
        if pipe.experts:
            raise ConfigError("an expert with experts of its own", where, "list them side by side")
        if expert.pipe is None:
            _check_denoiser(main, pipe, where)
        else:
            _check_pipeline(main, pipe, own, where)
        try:
            pipe.check()
        except ConfigError as error:
            raise ConfigError(error.what, f"{where}: {error.where}", error.fix) from None
        if pipe.latent_shape((64, 64)) != main.latent_shape((64, 64)):
            shapes = [p.latent_shape((64, 64)) for p in (pipe, main)]
            what = "latents {} of 64 px, the pipeline has {}".format(*shapes)
            raise ConfigError(what, where, "experts draw on the latents of one autoencoder")
        reads = [[_reads(c.module) for c in p.controllers] for p in (pipe, main)]
        if reads[0] not in ([], reads[1]):
            what = "controllers that read {}, the pipeline's read {}".format(*reads)
            fix = "give as many that read the same to both, or none to the expert: []"
            raise ConfigError(what, where, fix)


def _reads(adapter):
    """What a controller's picture becomes: its kind, and pixels a latent."""
    kind, factor = (getattr(adapter, name, None) for name in ("hint_kind", "hint_factor"))
    return f"{kind or 'pictures'} of {factor} pixels a latent" if factor else f"{kind}"


def _check_denoiser(main, pipe, where):
    own, given = (type(p.components[p.denoiser].module).__name__ for p in (main, pipe))
    if own != given:
        fix = "give its whole pipeline, with the texts that it reads"
        raise ConfigError(f"a {given} in the place of a {own}", where, fix)


def _check_pipeline(main, pipe, own, where):
    """Latents and noise must mean the same; where the networks lie must be the same, too."""
    for name in ("offload", "mesh"):
        if getattr(pipe, name) != getattr(main, name):
            what = f"its {name} is {getattr(pipe, name)}, the pipeline's {getattr(main, name)}"
            raise ConfigError(what, where, "load it as the pipeline, or give its path")
    other = schedule.from_config(pipe.scheduler)
    same = np.array_equal(own.alphas_cumprod, other.alphas_cumprod)
    if not same:
        raise ConfigError("another noise schedule than the pipeline's", where)
    kinds = [schedule.model_fields(p.scheduler)["prediction_type"] for p in (pipe, main)]
    if kinds[0] != kinds[1]:
        raise ConfigError("it predicts {}, the pipeline {}".format(*kinds), where)
    for name in ("scaling_factor", "shift_factor"):
        values = [getattr(p.components["vae"].module, name) for p in (pipe, main)]
        if values[0] != values[1]:
            what = "{} of its autoencoder is {}, the pipeline's {}".format(name, *values)
            raise ConfigError(what, where, "experts draw on the latents of one autoencoder")
