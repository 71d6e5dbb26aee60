"""ControlNet-XS in the two layouts of whole directories that are not the adapter's own."""

from pathlib import Path

from cnxs_jax.convert import controlnet_xs, families, files, rules
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.pipelines.load import make_directory
from cnxs_jax.storage import write_json

FILE = "diffusion_pytorch_model.safetensors"
FUSED = fused.CLASS
# Whose computation a fused directory follows: what diffusers computes that opens it.
FUSED_COMPAT = "diffusers_pretrained"


def is_fused(path):
    """Whether this is a directory of diffusers' `UNetControlNetXSModel`, or the file in one.

    Raises ConfigError for a config.json that cannot be read.
    """
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config.is_file() and files.read_config(config).get("_class_name") == FUSED


def save_fused(base, control, directory, dtype=None):
    """Writes diffusers' `UNetControlNetXSModel`: base and adapter in one.

    Args:
        base, control: (module, params) of the UNet and of the ControlNet-XS.
        dtype: of the stored weights, "bfloat16" or "float32"; None: as they are.

    Raises ConfigError for sizes or types that the fused model does not have.
    """
    config = fused.join_config(*(families.config_of(module) for module, _ in (base, control)))
    tensors = fused.join(*(rules.to_tensors(params) for _, params in (base, control)))
    write(directory, tensors, config, dtype)


def save_research(module, params, directory, dtype=None):
    """Writes the adapter as diffusers 0.24 to 0.26 had it (`ControlNetXSModel`).

    Raises ConfigError for adapters that it cannot be.
    """
    config = controlnet_xs.to_research(module)
    write(directory, controlnet_xs.research_tensors(module, params), config, dtype)


def write(directory, tensors, config, dtype):
    """The weights and config.json of one component."""
    directory = Path(directory)
    make_directory(directory)
    files.write_safetensors(directory / FILE, tensors, dtype=dtype)
    write_json(directory / "config.json", config)
