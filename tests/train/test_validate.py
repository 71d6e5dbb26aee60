"""Bad configs: one clear message each, all on the host."""

import pathlib
import sys
import time

import jax
import pytest
from ml_collections import ConfigDict

import configs.ediffi
import configs.pixart
import configs.pixart_lcm
import configs.pixart_style
import configs.scene_clip
from cnxs_jax.errors import ConfigError
from tests.train import toy
from train import validate

# (recipe, key, value, a word of the message)
TEACHER, VAE, LCM, TOY, LAYOUT = "teacher", "vae", "lcm", "toy", "layout"
NAN, INF = float("nan"), float("inf")
RECIPES = (
    configs.pixart, configs.pixart_lcm, configs.pixart_style, configs.ediffi, configs.scene_clip,
)  # fmt: skip
REPORT = {"num_prompts": 4, "num_real": 4, "steps": (1, 2), "reference_steps": 5}
BAD = [
    (TOY, "steps", 0, "steps"),
    (TOY, "steps", -5, "-5"),
    (TOY, "steps", 2.5, "not an integer"),
    (TOY, "steps", "100", "not an integer"),
    (TOY, "steps", True, "not an integer"),
    (TOY, "steps", None, "steps"),
    (TOY, "batch_size", 0, "batch_size"),
    (TOY, "batch_size", 10, "8 and 16"),  # grad_accum 8 below
    (TOY, "grad_accum", 0, "grad_accum"),
    (TOY, "grad_accum", 5, "15 and 20"),
    (TOY, "seed", -1, "seed"),
    (TOY, "seed", 2**40, "out of range"),
    (TOY, "ema_decay", 1.0, "ema_decay"),
    (TOY, "ema_decay", -0.1, "ema_decay"),
    (TOY, "ema_decay", NAN, "nan"),
    (TOY, "ema_warmup", "yes", "True or False"),
    (TOY, "log_every", 0, "log_every"),
    (TOY, "save_every", 0, "save_every"),
    (TOY, "sample_every", 0, "sample_every"),
    (TOY, "max_to_keep", 1, "2 or more"),
    (TOY, "stepz", 3, 'Did you mean "steps"'),
    (TOY, "batchsize", 3, 'Did you mean "batch_size"'),
    (TOY, "task", "tests.train.toy:bild", 'Did you mean "build"'),
    (TOY, "task", "tests.train.toi:build", "no task"),
    (TOY, "task", "", "not a string"),
    (TOY, "task", ":build", "no task"),
    (TOY, "task", ".toy:build", "no task"),
    (TOY, "mesh", {"dta": 8}, 'Did you mean "data"'),
    (TOY, "mesh", {"data": -1, "fsdp": -1}, "only one"),
    (TOY, "mesh", {"data": 0}, "positive"),
    (TOY, "mesh", {"data": 3}, "15 and 18"),
    (TOY, "rules", (("kernel", "fsdp"),), "(pattern, spec)"),
    (TOY, "rules", (("(", ("fsdp",)),), "regular expression"),
    (TOY, "rules", 5, "tuple of rules"),
    (TOY, "rules", (5,), "(pattern, spec)"),
    (TOY, "rules", (("kernel", 5),), "(pattern, spec)"),
    (TOY, "rules", (("kernel", (None, 5)),), "unknown value 5"),
    (TOY, "rules", (("kernel", (("data", "fsd"),)),), 'Did you mean "fsdp"'),
    (TOY, "mesh", 8, "axis: size"),
    (TOY, "report", {**REPORT, "solvers": ("DDPM",)}, 'Did you mean "DDIM"'),
    (TOY, "report", {**REPORT, "solvers": "DDIM"}, "tuple of solvers"),
    (TOY, "report", {**REPORT, "steps": 4.5}, "tuple of"),
    (TOY, "report", {**REPORT, "metrics": ("kd",)}, 'Did you mean "kid"'),
    (TOY, "report", {**REPORT, "metrics": "kid"}, "tuple of metrics"),
    (TOY, "freeze", "vae/.*", "write (pattern,)"),
    (TOY, "freeze", ("*",), "regular expression"),
    (TOY, "optimizer.name", "adamww", 'Did you mean "adamw"'),
    (TOY, "optimizer.lr", 1e-3, "unknown key 'lr'"),
    (TOY, "optimizer.learning_rate", 0.0, "learning_rate"),
    (TOY, "optimizer.learning_rate", -1e-4, "learning_rate"),
    (TOY, "optimizer.learning_rate", "1e-4", "not '1e-4'"),
    (TOY, "optimizer.learning_rate", NAN, "nan"),
    (TOY, "optimizer.learning_rate", INF, "inf"),
    (TOY, "optimizer.schedule", "cosin", 'Did you mean "cosine"'),
    (TOY, "optimizer.warmup_steps", 21, "more than steps 20"),
    (TOY, "optimizer.warmup_steps", -1, "warmup_steps"),
    (TOY, "optimizer.b1", 1.0, "b1"),
    (TOY, "optimizer.b2", -0.5, "b2"),
    (TOY, "optimizer.eps", 0.0, "eps"),
    (TOY, "optimizer.weight_decay", -0.1, "weight_decay"),
    (TOY, "optimizer.clip_norm", 0.0, "clip_norm"),
    (TOY, "optimizer.no_decay", "bias", "write (pattern,)"),
    (TOY, "toy.width", 0, "toy.width"),
    (TOY, "optimizer", 3, "not a table"),
    (TEACHER, "data.source", "emoji_scene", 'Did you mean "emoji_scenes"'),
    (TEACHER, "data.size", 60, "48 and 64"),
    (TEACHER, "data.size", "64", "not an integer"),
    (TEACHER, "data.max_length", 0, "max_length"),
    (TEACHER, "caption_dropout", 1.5, "caption_dropout"),
    (TEACHER, "caption_dropout", -0.1, "caption_dropout"),
    (TEACHER, "text_encoder", None, "text_encoder_path"),
    (TEACHER, "text_encoder_path", "t5", "one of them"),
    (TEACHER, "transformer.num_layer", 3, 'Did you mean "num_layers"'),
    (TEACHER, "transformer.num_layers", 0, "num_layers"),
    (TEACHER, "transformer.out_channels", 4, "expected 8"),
    (TEACHER, "transformer.dtype", "float16", "bfloat16"),
    (TEACHER, "transformer.sample_size", 15, "patches of 2"),
    (TEACHER, "text_encoder.d_model", -1, "d_model"),
    (TEACHER, "schedule.name", "cosin", "schedule.name"),
    (TEACHER, "schedule.beta_end", 1.0, "beta_end"),
    (TEACHER, "schedule.num_steps", 1, "num_steps"),
    (TEACHER, "objective.prediction", "v", "v_prediction"),
    (TEACHER, "objective.loss_weighting", "minsnr", "min_snr"),
    (TEACHER, "objective.snr_gamma", 0.0, "snr_gamma"),
    (TEACHER, "objective.learned_range", True, "expected 16"),
    (TEACHER, "objective.t_range", (0, 1001), "inside [0, 1000)"),
    (TEACHER, "objective.t_range", (7, 7), "inside [0, 1000)"),
    (TEACHER, "objective.t_range", (7,), "tuple of 2"),
    (TEACHER, "vae_path", "", "not a string"),
    (TEACHER, "transformer.remat", "fulll", 'Did you mean "full"'),
    (TEACHER, "transformer.interpolation_scale", "x", "not a number"),
    (TEACHER, "data.tokenizer", None, "needs a tokenizer"),
    (TEACHER, "data.relations", 1.5, "out of range"),
    (TEACHER, "word_order", -1.0, "word_order"),
    (TEACHER, "layout", -1.0, "layout"),
    (LAYOUT, "data.source", "coco_captions", "what stands where"),
    (VAE, "vae.block_out_channels", (), "tuple"),
    (VAE, "optimizer.weight_decay", 0.5, "no effect with adam"),
    (VAE, "vae.block_out_channels", 32, "tuple"),
    (VAE, "vae.block_out_channels", (32, 0), "out of range"),
    (VAE, "vae.latent_channels", 0, "latent_channels"),
    (VAE, "objective.kl", -1.0, "kl"),
    (VAE, "objective.perceptual", 1.0, "unknown key"),
    (LCM, "objective.num_ddim_steps", 0, "num_ddim_steps"),
    (LCM, "objective.num_ddim_steps", 30, "must divide"),
    (LCM, "objective.num_ddim_steps", 2000, "must divide"),
    (LCM, "objective.omega", -1.0, "omega"),
    (LCM, "objective.loss", "pseudo_hubr", 'Did you mean "pseudo_huber"'),
    (LCM, "objective.huber_c", 0.0, "huber_c"),
    (LCM, "null", "lerned", 'Did you mean "learned"'),
    (LCM, "dtype", "float16", "bfloat16"),
    (LCM, "teacher_path", 3, "not a string"),
]


def recipe(name):
    if name == TOY:
        return toy.config().to_dict()
    if name == LCM:
        return configs.pixart_lcm.get_config().to_dict()
    return configs.pixart.get_config()[name].to_dict()


def changed(name, key, value):
    values = recipe(name)
    if (key, value) == ("batch_size", 10):
        values["grad_accum"] = 8
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    return values


@pytest.mark.parametrize(("name", "key", "value", "words"), BAD, ids=str)
def test_bad_config(name, key, value, words):
    with pytest.raises(ConfigError) as error:
        validate.check_stage(changed(name, key, value), "config")
    message = str(error.value)
    assert words in message
    assert "config" in message
    assert error.value.code == 2


def test_all_together_take_less_than_two_seconds():
    assert len(BAD) >= 60
    start = time.perf_counter()
    for name, key, value, _ in BAD:
        with pytest.raises(ConfigError):
            validate.check_stage(changed(name, key, value), "config")
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("line", "kind"), [("int('x')", ValueError), ("import no_such_package", ModuleNotFoundError)]
)
def test_a_fault_of_the_module_itself_is_not_the_configs(tmp_path, monkeypatch, line, kind):
    (tmp_path / "faulty_task.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind):
        validate.check_stage(changed(TOY, "task", "faulty_task:build"), "config")


@pytest.mark.parametrize("key", ["steps", "seed", "task", "optimizer", "mesh", "toy"])
def test_missing_keys_are_named(key):
    values = recipe(TOY)
    del values[key]
    with pytest.raises(ConfigError, match=key):
        validate.check_stage(values, "config")


def test_every_recipe_and_variant_is_valid():
    for module in RECIPES:
        for variant in module.VARIANTS:
            validate.check(module.get_config(variant))
    validate.check(toy.config())


def test_unknown_variant_is_named():
    for module in RECIPES:
        with pytest.raises(ValueError, match="tiny"):
            module.get_config("tny")


def test_what_is_right_passes():
    """The counterparts of the bad rules, solvers and warm-ups."""
    values = recipe(TOY)
    values["rules"] = (("kernel", (None, ("data", "fsdp"))), ("bias", ["tensor"]))
    values["report"] = {**REPORT, "solvers": ("DDIM", "DPM-Solver++"), "metrics": ("kid",)}
    values["optimizer"]["warmup_steps"] = None
    validate.check_stage(values, "config")


def test_stages_must_exist():
    config = configs.pixart.get_config()
    with pytest.raises(ConfigError, match="5 is not a tuple of stages"):
        validate.check(ConfigDict({"stages": 5}))
    config.stages = ("vae", "teachr")
    with pytest.raises(ConfigError, match="teachr"):
        validate.check(config)


def test_configs_import_ml_collections_and_their_common_pieces_only():
    folder = pathlib.Path(configs.pixart.__file__).parent
    for path in folder.glob("*.py"):
        words = [line.split() for line in path.read_text().splitlines() if line]
        imports = [line for line in words if line[0] in ("import", "from")]
        for line in imports:
            ours = line == ["from", "configs", "import", "common"] and path.stem != "common"
            assert ours or line[:3] == ["from", "ml_collections", "import"], (path, line)


def test_checking_touches_no_device(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a device was asked for")

    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setattr(jax, "jit", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    validate.check(configs.pixart.get_config())
    assert "jax" in sys.modules
