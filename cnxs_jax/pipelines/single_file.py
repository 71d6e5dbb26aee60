"""A Stable Diffusion pipeline as one `.safetensors` file in the original layout."""

from pathlib import Path

from cnxs_jax.convert import files, rules, single_file
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.load import make_directory


def kind_of_pipeline(pipe):
    """Which of `single_file.LAYOUTS` the pipeline's networks have. Raises ConfigError."""
    names = set(pipe.components)
    if not names <= set(single_file.COMPONENTS):
        raise ConfigError(
            f"{pipe.class_name} has no single-file layout",
            "save_single_file",
            "convert one network: --component=transformer",
        )
    if "text_encoder_2" in names:
        return "sdxl" if "text_encoder" in names else "sdxl_refiner"
    # OpenAI's CLIP (Stable Diffusion 1) and OpenCLIP (2) differ in their activation.
    activation = pipe.components["text_encoder"].module.hidden_act
    return "sd15" if activation == "quick_gelu" else "sd21"


def save_single_file(pipe, file, dtype=None):
    """Writes the networks of `pipe` into one `.safetensors` file, as the original code names them.

    Scheduler and tokenizers are no part of such a file. What opens it takes the published
    tokenizers, and asks which prediction type a model of Stable Diffusion 2 has.

    Args:
        dtype: of the stored weights, "float32" or "bfloat16"; as they are unless given.

    Raises:
        ConfigError: no Stable Diffusion pipeline, one with controllers or experts, or another
            ending than `.safetensors`.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file.name!r} does not end in .safetensors", "save_single_file")
    if pipe.controllers:
        what = f"such a file has no place for {len(pipe.controllers)} controller(s)"
        fix = "write it without them, `pipe.replace(control=[])`, and each on its own"
        raise ConfigError(what, "save_single_file", fix)
    kind, parts = kind_of_pipeline(pipe), {}
    if pipe.experts:
        fix = "write it without them, `pipe.replace(experts=[])`, and each on its own"
        raise ConfigError("such a file has no place for experts", "save_single_file", fix)
    for name, (module, params) in pipe.components.items():
        table = single_file.table_of(kind, name, module)
        parts[name] = rules.to_tensors(params, table, where=name)
    make_directory(file.parent)
    files.write_safetensors(file, single_file.join(kind, parts), dtype=dtype)
