"""A reference picture for a pipeline of text alone: its words, its weight, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import sharding
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.clip import CLIPVisionModelWithProjection
from cnxs_jax.models.style_words import StyleWords
from cnxs_jax.pipelines import style
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.load import save_model
from cnxs_jax.sample import DEFAULT_MODEL
from tests.pipelines import tiny

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
IMAGE = CLIPVisionModelWithProjection(
    hidden_size=16, intermediate_size=32, projection_dim=6, num_hidden_layers=1,
    num_attention_heads=2, image_size=16, patch_size=8,
)  # fmt: skip
WORDS = StyleWords(projection_dim=6, d_model=16, num_words=2, hidden_size=8)


def write(root, words=WORDS, image=IMAGE):
    """A style's directory of random networks."""
    size = image.image_size
    save_model(
        image, tiny.perturbed(image, jnp.zeros((1, size, size, 3))), root / "clip_image_encoder"
    )
    save_model(words, tiny.perturbed(words, jnp.zeros((1, 6)), seed=1), root / "style_words")
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Directories of a pipeline and of a style for it."""
    root = tmp_path_factory.mktemp("stored")
    cnxs_jax.save_pipeline(tiny.pipeline(root / "tokens"), root / "pipe")
    return root / "pipe", write(root / "style")


@pytest.fixture(scope="module")
def pipe(stored):
    return cnxs_jax.load_pipeline(stored[0], style=stored[1])


def drawn(pipe, prompt="a boat", **options):
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(prompt, **options).images


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_a_picture_changes_what_is_drawn_and_no_picture_changes_nothing(stored, pipe):
    plain = drawn(cnxs_jax.load_pipeline(stored[0]))
    np.testing.assert_array_equal(drawn(pipe), plain)
    styled = drawn(pipe, style_image=PICTURE)
    assert difference(styled, plain) > 1e-3
    assert difference(drawn(pipe, style_image=255 - PICTURE), styled) > 1e-4


def meaning(pipe, phrase):
    """The same with pseudo-words that are the phrase's, whatever the picture."""
    ids = pipe.tokenizer(phrase, add_special_tokens=False)["input_ids"]
    table = pipe.components["text_encoder"].params["shared"]["embedding"]
    words = dataclasses.replace(WORDS, num_words=len(ids))
    params = tiny.perturbed(words, jnp.zeros((1, 6)))
    bias = table[jnp.array(ids)].reshape(-1)
    params["linear_2"] = {"kernel": jnp.zeros((8, bias.size)), "bias": bias}
    return pipe.replace(style=style.Style(pipe.style.image_encoder, Component(words, params)))


def test_words_that_are_a_phrases_draw_what_the_phrase_draws(pipe):
    own, named = meaning(pipe, " red fox"), drawn(pipe, "a boat red fox")
    assert difference(drawn(own, style_image=PICTURE), named) < 1e-5
    assert difference(drawn(own), named) > 1e-2


@pytest.fixture(scope="module", params=["empty_prompt", "learned"])
def either(pipe, request):
    """The pipeline with either kind of unconditional caption."""
    null = jax.random.normal(jax.random.key(2), (24, 16))
    return pipe if request.param == "empty_prompt" else dataclasses.replace(pipe, null_text=null)


def test_the_weight_of_the_style(either):
    """u + w (c - u) + v (s - c): the text alone with v = 0, both together with v = w."""
    options = {"style_image": PICTURE, "guidance_scale": 3.0}
    plain, styled = drawn(either, guidance_scale=3.0), drawn(either, **options)
    assert difference(drawn(either, **options, style_scale=0.0), plain) < 1e-4
    assert difference(drawn(either, **options, style_scale=3.0), styled) < 1e-4
    assert difference(drawn(either, **options, style_scale=6.0), styled) > 1e-3


def test_the_weight_of_the_style_beside_a_controller(pipe):
    controlled = pipe.replace(control=tiny.controller())
    hint = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    options = {"guidance_scale": 3.0, "image": hint}
    plain = drawn(controlled, **options)
    assert difference(plain, drawn(pipe, guidance_scale=3.0)) > 1e-3
    options["style_image"] = PICTURE
    assert difference(drawn(controlled, **options, style_scale=0.0), plain) < 1e-4
    styled = drawn(controlled, **options)
    assert difference(drawn(controlled, **options, style_scale=3.0), styled) < 1e-4


def test_a_students_steps_take_the_style_without_guidance(pipe):
    student = pipe.replace(scheduler="lcm")
    assert difference(drawn(student, style_image=PICTURE), drawn(student)) > 1e-3
    with pytest.raises(ConfigError, match="guidance_scale > 1"):
        drawn(student, style_image=PICTURE, style_scale=2.0)


def test_a_mesh_draws_the_same(stored, pipe):
    mesh = sharding.make_mesh({"data": 2}, devices=jax.devices()[:2])
    spread = cnxs_jax.load_pipeline(stored[0], style=stored[1], mesh=mesh)
    options = {"style_image": [PICTURE, 255 - PICTURE, PICTURE], "style_scale": 2.0}
    prompts = ["a boat", "two blue cats", "a red fox"]
    assert difference(drawn(spread, prompts, **options), drawn(pipe, prompts, **options)) < 1e-4


def test_a_picture_does_not_depend_on_its_batch(pipe):
    pictures = [PICTURE, 255 - PICTURE]
    both = drawn(pipe, ["a boat", "two blue cats"], style_image=pictures, num_images_per_prompt=2)
    for n, (prompt, picture) in enumerate(zip(["a boat", "two blue cats"], pictures, strict=True)):
        seeds = [(0, 2 * n), (0, 2 * n + 1)]
        alone = drawn(pipe, prompt, style_image=picture, num_images_per_prompt=2, seed=seeds)
        assert difference(both[2 * n : 2 * n + 2], alone) < 1e-4


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloaded_networks_read_the_same_words(stored, pipe, mode):
    own = cnxs_jax.load_pipeline(stored[0], style=stored[1], offload=mode)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(own.style.words.params))
    found = drawn(own, style_image=PICTURE)
    assert difference(found, drawn(pipe, style_image=PICTURE)) < 1e-5


def test_experts_that_are_copies_see_the_reference(pipe):
    copies = pipe.replace(experts=[{"below": 500, "model": pipe.components["transformer"][:2]}])
    options = {"style_image": PICTURE, "num_inference_steps": 4}
    found, alone = drawn(copies, **options), drawn(pipe, **options)
    np.testing.assert_array_equal(found, alone)


def test_experts_with_texts_of_their_own_read_the_reference_too(stored, pipe):
    own = pipe.replace(experts=[{"below": 500, "model": str(stored[0])}])
    options = {"style_image": PICTURE, "num_inference_steps": 4}
    assert difference(drawn(own, **options), drawn(pipe, **options)) < 1e-5
    words = tiny.perturbed(WORDS, jnp.zeros((1, 6)), seed=5)
    other = style.Style(pipe.style.image_encoder, Component(WORDS, words))
    apart = pipe.replace(experts=[{"below": 950, "model": pipe.replace(style=other)}])
    assert difference(drawn(apart, **options), drawn(pipe, **options)) > 1e-4


def test_painted_words_keep_their_places(pipe):
    """Painted beside pseudo-words that are a phrase's, as beside the phrase."""
    mask = np.zeros((16, 16), np.float32)
    mask[:, :8] = 1
    painted = {"word_masks": {"boat": (mask, 4.0)}}
    own = meaning(pipe, " red fox")
    found = drawn(own, style_image=PICTURE, **painted)
    assert difference(found, drawn(pipe, "a boat red fox", **painted)) < 1e-5
    assert difference(found, drawn(own, style_image=PICTURE)) > 1e-3
    nothing = drawn(pipe, style_image=PICTURE, word_masks={"boat": np.zeros((16, 16))})
    np.testing.assert_array_equal(nothing, drawn(pipe, style_image=PICTURE))


@pytest.mark.filterwarnings("ignore:.*dropped")
@pytest.mark.parametrize("prompt", ["boat", "boat red fox a blue boat"])
def test_a_style_of_no_weight_paints_as_the_text_alone(pipe, prompt):
    """The pseudo-words do not count there, and what they crowd out of a long prompt is painted."""
    short = dataclasses.replace(pipe, null_text=jnp.zeros((7, 16)))  # texts of 7 tokens
    mask = np.zeros((16, 16), np.float32)
    mask[:, :8] = 1
    options = {"word_masks": {"boat": (mask, 4.0)}, "guidance_scale": 3.0}
    found = drawn(short, prompt, **options, style_image=PICTURE, style_scale=0.0)
    assert difference(found, drawn(short, prompt, **options)) < 1e-5


def test_a_painted_phrase_that_the_style_leaves_no_room_for_is_named(pipe):
    long = dataclasses.replace(pipe, null_text=jnp.zeros((8, 16)))  # texts of 8 tokens
    masks, prompt = {"boat": np.ones((16, 16))}, "a red fox two blue cats a boat"
    with pytest.raises(ConfigError, match="'boat' is beyond the 6 tokens"):
        drawn(long, prompt, style_image=PICTURE, word_masks=masks)


def test_placeholders_stand_before_the_end():
    ids = np.array([[5, 6, 1], [5, 1, 0]], np.int32)
    found, mask = style.insert(ids, (ids > 0).astype(np.int32), [-1, -2], 6)
    np.testing.assert_array_equal(found, [[5, 6, -1, -2, 1, 0], [5, -1, -2, 1, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])


def test_a_prompt_that_fills_its_row_loses_its_end_and_keeps_the_style(pipe):
    short = dataclasses.replace(pipe, null_text=jnp.zeros((6, 16)))  # texts of 6 tokens
    with pytest.warns(UserWarning, match="dropped"):
        found = drawn(short, "a red fox two blue cats", style_image=PICTURE)
    with pytest.warns(UserWarning, match="dropped"):
        other = drawn(short, "a red fox two blue cats", style_image=255 - PICTURE)
    assert difference(found, other) > 1e-4


def test_it_is_taken_off_before_the_pipeline_is_saved(pipe, tmp_path):
    with pytest.raises(ConfigError, match="no layout of style words"):
        cnxs_jax.save_pipeline(pipe, tmp_path / "pipe")
    off = pipe.replace(style=[])
    cnxs_jax.save_pipeline(off, tmp_path / "pipe")
    with pytest.raises(ConfigError, match="loaded without style words"):
        off("a boat", style_image=PICTURE)


def test_the_result_says_what_was_asked(pipe):
    options = {"style_image": PICTURE, "style_scale": 2.0, "num_inference_steps": 1}
    assert pipe("a boat", **options).parameters[0]["style_scale"] == 2.0
    assert "style_scale" not in pipe("a boat", num_inference_steps=1).parameters[0]


BAD_CALLS = [
    ({"style_scale": 2.0}, "needs a style_image"),
    ({"style_image": PICTURE, "style_scale": 2.0, "guidance_scale": 1.0}, "guidance_scale > 1"),
    ({"style_image": PICTURE, "style_scale": -1.0}, "number of 0 or more"),
    ({"style_image": [PICTURE] * 2}, "2 pictures for 1 prompts"),
    ({"style_image": PICTURE[..., :1]}, "one RGB image"),
    ({"style_image": "a.png"}, "one RGB image"),
    ({"style_image": np.zeros((0, 4, 3), np.uint8)}, "one RGB image"),
    ({"style_image": PICTURE, "style_scale": 10**400}, "number of 0 or more"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_calls_are_named(pipe, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        pipe("a boat", **options)
    assert caught.value.where in ("style_image", "style_scale")


def test_families_that_read_no_words_of_this_kind_refuse_them(stored):
    for name in ("sd_tiny", "ediffi_tiny"):
        with pytest.raises(ConfigError, match="takes no `style`"):
            cnxs_jax.load_pipeline(DEFAULT_MODEL.parent / name, style=stored[1])


def test_bad_styles_are_named(stored, tmp_path):
    wide = write(tmp_path / "wide", dataclasses.replace(WORDS, d_model=24))
    with pytest.raises(ConfigError, match="words of 24 channels for a text encoder of 16"):
        cnxs_jax.load_pipeline(stored[0], style=wide)
    with pytest.raises(ConfigError, match="expected a directory, got int"):
        cnxs_jax.load_pipeline(stored[0], style=3)
    with pytest.raises(CheckpointError, match="no such directory"):
        cnxs_jax.load_pipeline(stored[0], style=tmp_path / "nothing")
    many = write(tmp_path / "many", dataclasses.replace(WORDS, num_words=119))
    with pytest.raises(ConfigError, match="119 words in texts of 120 tokens"):
        cnxs_jax.load_pipeline(stored[0], style=many)
    with pytest.raises(CheckpointError, match="no directory clip_image_encoder"):
        cnxs_jax.load_pipeline(stored[0], style=tmp_path)
    apart = write(tmp_path / "apart", image=dataclasses.replace(IMAGE, projection_dim=8))
    with pytest.raises(CheckpointError, match="pictures have 8 channels, 6 are read"):
        cnxs_jax.load_pipeline(stored[0], style=apart)
    (tmp_path / "swapped").mkdir()
    for one, other in (("clip_image_encoder", "style_words"), ("style_words", "style_words")):
        (tmp_path / "swapped" / one).symlink_to(stored[1] / other)
    with pytest.raises(CheckpointError, match="they hold StyleWords and StyleWords"):
        cnxs_jax.load_pipeline(stored[0], style=tmp_path / "swapped")
