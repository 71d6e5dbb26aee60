"""Controllers in the pipeline: any adapter works, pictures fit or are refused."""

import jax
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
from cnxs_jax.convert import families
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import control as controls
from cnxs_jax.pipelines import images, load, programs
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines.control import Controller
from cnxs_jax.pipelines.single_file import save_single_file
from cnxs_jax.storage import write_json
from tests.pipelines import tiny, tiny_sd

PICTURE = tiny_sd.ramp()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pipe(plain):
    return plain.replace(control=tiny_sd.adapter())


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("tokenizer")).replace(control=tiny.controller())


def test_a_single_file_has_no_place_for_a_controller(pipe, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)no place for 1 .*replace\(control=\[\]\)"):
        save_single_file(pipe, tmp_path / "all.safetensors")
    save_single_file(pipe.replace(control=[]), tmp_path / "all.safetensors")


def test_of_a_file_with_a_base_the_controller_is_taken(pixart, tmp_path):
    """PixArt's own: both networks in one file."""
    both = controls.attach(pixart.components["transformer"], pixart.controllers)
    load.save_official(*both, tmp_path / "control.safetensors")
    own = pixart.controllers[0]
    write_json(tmp_path / "config.json", families.config_of(own.module))
    found = pixart.replace(control=tmp_path / "control.safetensors").controllers[0]
    assert found.module == own.module
    jax.tree.map(np.testing.assert_array_equal, found.params, own.params)


def _np(pipe, prompt="a boat", image=PICTURE, **kwargs):
    kwargs = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0, **kwargs}
    return pipe(prompt, image=image, **kwargs).images


def test_scale_and_interval(plain, pipe):
    full = _np(pipe)
    base_alone = _np(plain, image=None)
    np.testing.assert_allclose(_np(pipe, controlnet_conditioning_scale=0.0), base_alone, atol=1e-5)
    half = _np(pipe, controlnet_conditioning_scale=0.5)
    first = _np(pipe, control_guidance_end=0.5)
    last = _np(pipe, control_guidance_start=0.5)
    found = [full, half, first, last, base_alone]
    for i, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-3 for other in found[:i])
    taken_off = pipe.replace(control=[])
    np.testing.assert_array_equal(_np(taken_off, image=None), base_alone)
    guided = _np(pipe, guidance_scale=7.5)  # both halves see the hint
    assert np.abs(guided - full).max() > 1e-3


def test_nothing_recompiles(pipe, monkeypatch):
    _np(pipe)
    before = programs.denoise._cache_size()
    for change in (
        {"controlnet_conditioning_scale": 0.3},
        {"control_guidance_start": 0.5},
        {"control_guidance_end": 0.5},
        {"image": 1 - PICTURE},
        {"seed": 5},
        {"prompt": "a red fox"},
    ):
        _np(pipe, **change)
    assert programs.denoise._cache_size() == before


def test_pictures_of_every_kind_are_the_same_hint(pipe):
    levels = np.round(PICTURE * 255).astype(np.uint8)
    want = _np(pipe, image=levels)
    np.testing.assert_allclose(_np(pipe, image=levels / np.float32(255)), want, atol=1e-6)
    np.testing.assert_array_equal(_np(pipe, image=Image.fromarray(levels)), want)
    np.testing.assert_array_equal(_np(pipe, image=levels[None]), want)
    large = Image.fromarray(levels).resize((35, 35), Image.Resampling.NEAREST)
    resized = _np(pipe, image=large, height=16, width=16)
    assert 0 < np.abs(resized - want).max() < np.abs(_np(pipe, image=1 - PICTURE) - want).max()


def test_size_is_that_of_the_picture(pipe):
    wide = Image.fromarray(np.round(tiny_sd.ramp(13, 21) * 255).astype(np.uint8))
    control = controls.check(pipe.controllers, wide, 1.0, 0.0, 1.0, _request(pipe, ["a"], 1))
    assert control.sides(None, None, pipe.multiple) == (12, 20)
    assert control.sides(24, None, pipe.multiple) == (24, 20)


def test_pictures_of_several_prompts(pipe):
    prompts, other = ["a boat", "a red fox"], 1 - PICTURE
    two = _np(pipe, prompts, image=[PICTURE, other])
    alone = [_np(pipe), _np(pipe, prompts[1], image=other, seed=[(0, 1)])]
    for both, one in zip(two, alone, strict=True):  # another batch size is another program
        assert np.abs(both - one[0]).max() <= 1e-4 * np.abs(one).max()
    four = controls.check(
        pipe.controllers, [PICTURE, other], 1.0, 0.0, 1.0, _request(pipe, prompts, 2)
    )
    cond = controls.condition(four, pipe.controllers, (8, 8), pipe, _request(pipe, prompts, 2))
    for row, want in enumerate((PICTURE, PICTURE, other, other)):
        np.testing.assert_array_equal(cond["hint"][row], want)


def _request(pipe, prompts, repeats):
    return requests.check(prompts, None, 2, 7.5, None, None, repeats, 0, None, "np")


def test_several_controllers(plain, pipe):
    two = plain.replace(control=[tiny_sd.adapter(), tiny_sd.adapter(1)])
    other = 1 - PICTURE
    first = _np(two, image=[PICTURE, other], controlnet_conditioning_scale=[1.0, 0.0])
    np.testing.assert_allclose(first, _np(pipe), atol=1e-5)
    late = _np(two, image=[PICTURE, other], control_guidance_start=[0.0, 0.5])
    assert np.abs(late - _np(two, image=[PICTURE, other])).max() > 1e-3
    with pytest.raises(ConfigError, match="expected a list of 2"):
        _np(two)


BAD = [
    ({"image": None}, "image", "needs a control picture"),
    ({"image": []}, "image", "empty"),
    ({"image": PICTURE * 300}, "image", r"\[0,1\]"),
    ({"image": PICTURE[..., :1]}, "image", r"RGB image \[H,W,3\]"),
    ({"image": PICTURE, "height": 24}, "image", "16x16, expected 24x16"),
    ({"image": [PICTURE] * 2}, "image", "2 control pictures for 1 prompts and 1 images"),
    ({"controlnet_conditioning_scale": [1.0, 1.0]}, "controlnet_conditioning_scale", "1 finite"),
    ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale", "finite"),
    ({"control_guidance_start": "0"}, "control_guidance_start", "finite"),
    (
        {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
        "control_guidance_start, control_guidance_end",
        "start < end",
    ),
]


@pytest.mark.parametrize(("arguments", "where", "message"), BAD)
def test_bad_control_stops_before_any_network_runs(pipe, monkeypatch, arguments, where, message):
    for name in ("denoise", "decode", "draw"):
        monkeypatch.setattr(programs, name, None)
    with pytest.raises(ConfigError, match=message) as caught:
        _np(pipe, **arguments)
    assert caught.value.where == where


def test_pixart_with_its_controller_is_saved_and_opened(pixart, tmp_path):
    want = _np(pixart, "a red fox")
    encoded = images.to_array(Image.fromarray(np.round(PICTURE * 255).astype(np.uint8)))
    assert np.abs(want - _np(pixart, "a red fox", image=1 - encoded)).max() > 1e-4
    cnxs_jax.save_pipeline(pixart, tmp_path / "pipe")
    opened = cnxs_jax.load_pipeline(tmp_path / "pipe")
    assert len(opened.controllers) == 1
    np.testing.assert_array_equal(_np(opened, "a red fox"), want)
    same = cnxs_jax.load_pipeline(tmp_path / "pipe", control=tmp_path / "pipe" / "controlnet")
    before, after = (jax.tree.leaves(p.controllers[0].params) for p in (opened, same))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_controller_of_another_base_is_refused(plain, pixart):
    with pytest.raises(ConfigError, match="controls a PixArt"):
        plain.replace(control=pixart.controllers[0])
    with pytest.raises(ConfigError, match="knows only 'official'"):
        pixart.replace(control=Controller(*pixart.controllers[0][:2], compat="diffusers"))
    with pytest.raises(ConfigError, match="expected the path of a controller"):
        plain.replace(control=3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda module, params: ("a", "b"), r"got \(str, str\)"),
        (lambda module, params: (module, None), r"got \(Adapter, NoneType\)"),
        (lambda module, params: (params, module), r"got \(dict, Adapter\)"),
        (lambda module, params: (module, params, "official"), r"got \(Adapter, dict, str\)"),
        (lambda module, params: (), r"got \(\)"),
        (lambda module, params: Controller("a", "b"), r"got \(str, str, str\)"),
    ],
)
def test_what_is_no_module_with_parameters_is_refused(plain, kind, words):
    with pytest.raises(ConfigError, match=rf"{words} \[control\](?s:.*)as a list"):
        plain.replace(control=kind(*tiny_sd.adapter()))


def test_parameters_of_another_network_are_refused(pixart):
    module, params, _ = pixart.controllers[0]
    blocks = params["controlnet_blocks"]
    narrow = jax.tree.map(lambda leaf: leaf[..., :-1], params["before_proj"])
    for changed, words in (
        (tiny_sd.adapter()[1], "before_proj/bias is missing, expected"),
        ({"controlnet_blocks": blocks}, "2 parameters .* before_proj/bias is missing"),
        (params | {"before_proj": narrow}, r"before_proj/bias is \(\d+,\), expected \(\d+,\)"),
        (params | {"spare": np.zeros(3)}, r"spare is \(3,\), expected none of this name"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            pixart.replace(control=(module, changed))
        assert caught.value.where == "control"
    pixart.replace(control=(module, params))
