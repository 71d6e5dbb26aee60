"""The task `style_words`: what it compares, that it learns, and what data it needs."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
import configs.pixart_style
from cnxs_jax.data.text import load_tokenizer
from cnxs_jax.errors import ConfigError, DataError
from cnxs_jax.sample import DEFAULT_MODEL
from train import loop, validate
from train.tasks_style import Captions


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_MODEL / "tokenizer")


def tokens(tokenizer, ids):
    """Tokens of ids up to the padding; of placeholders their numbers."""
    known = [int(i) for i in ids if i != tokenizer.pad_token_id]
    return [i if i < 0 else tokenizer.convert_ids_to_tokens(i) for i in known]


def test_pseudo_words_stand_where_the_style_is_named(tokenizer):
    source = [{"caption": "a crab, flat style on a blue background", "style": "flat"}]
    found = Captions(source, tokenizer, ", {} style", 3, 16)[0]
    before = ["▁a", "▁crab", "▁on", "▁a", "▁blue", "▁background"]
    assert tokens(tokenizer, found["ids"]) == [*before, -1, -2, -3, "</s>"]
    assert tokens(tokenizer, found["named"]) == [*before, ",", "▁flat", "▁style", "</s>"]
    np.testing.assert_array_equal(found["place"][:10], np.arange(10))
    assert found["mask"].sum() == found["named_mask"].sum() == 10


@pytest.mark.parametrize(("count", "place"), [(1, [2, 5]), (2, [2, 3, 5]), (5, [2, 2, 3, 3, 4, 5])])
def test_another_number_of_pseudo_words_is_spread_over_the_styles_own(tokenizer, count, place):
    source = [{"caption": "a crab", "style": "flat"}]
    found = Captions(source, tokenizer, ", {} style", count, 16)[0]
    np.testing.assert_array_equal(found["place"][2 : 3 + count], place)
    assert found["mask"].sum() == 3 + count


def test_a_long_caption_loses_its_end_and_no_style(tokenizer):
    source = [{"caption": "a crab and a fish", "style": "flat"}]
    with pytest.warns(UserWarning, match="dropped: 'and a fish'"):
        found = Captions(source, tokenizer, ", {} style", 1, 6)[0]
    assert tokens(tokenizer, found["ids"]) == ["▁a", "▁crab", -1, "</s>"]
    assert tokens(tokenizer, found["named"]) == ["▁a", "▁crab", ",", "▁flat", "▁style", "</s>"]


def test_examples_without_a_style_and_too_little_room_are_named(tokenizer):
    with pytest.raises(DataError, match="a picture without a style"):
        Captions([{"caption": "a crab"}], tokenizer, ", {} style", 3, 16)[0]
    with pytest.raises(DataError, match="', flat style' has 3 tokens, texts 4"):
        Captions([{"caption": "a crab", "style": "flat"}], tokenizer, ", {} style", 1, 4)[0]


def test_what_the_task_would_ignore_is_refused():
    config = configs.pixart_style.get_config("smoke")
    config.data.buckets = True
    with pytest.raises(ConfigError, match="cut to CLIP's square"):
        validate.check(config)


@pytest.mark.parametrize("text", ["style", "{} in {}", "{name} style"])
def test_a_phrase_has_one_place_for_the_style(text):
    config = configs.pixart_style.get_config("smoke")
    config.phrase = text
    with pytest.raises(ConfigError, match="has not one {}"):
        validate.check(config)


def task_of(tmp_path, **data):
    config = loop.expand(configs.pixart_style.get_config("tiny"), tmp_path)
    config.batch_size = 16
    config.data.update(data)
    return loop.build_task(config)


def test_a_few_steps_of_gradient_descent_bring_the_texts_nearer(tmp_path):
    """On one batch; the gradient comes through the text encoder, which stays as it is."""
    task = task_of(tmp_path)
    raw = {k: v for k, v in next(task.loader).items() if isinstance(v, np.ndarray)}
    batch = jax.jit(task.encode)(task.encoders, raw, jax.random.key(0))

    def loss(params):
        return task.objective(params, None, task.frozen, batch, None)[0]

    step = jax.jit(jax.value_and_grad(loss))
    params = jax.jit(task.params)(jax.random.key(0))
    first, _ = step(params)
    for _ in range(30):
        _, gradient = step(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert step(params)[0] < 0.6 * first


def test_words_start_as_the_mean_of_those_that_name_styles(tmp_path):
    task = task_of(tmp_path)
    bias = jax.jit(task.params)(jax.random.key(0))["linear_2"]["bias"].reshape(3, -1)
    table = task.frozen["text"]["shared"]["embedding"]
    ids = load_tokenizer(DEFAULT_MODEL / "tokenizer").convert_tokens_to_ids([",", "▁style"])
    np.testing.assert_allclose(bias[::2], table[np.array(ids)], rtol=1e-5)
    assert np.abs(bias[1] - bias[2]).max() > 0.1


def test_a_folder_names_its_styles_in_metadata(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    rows = [{"file_name": f"{n}.png", "text": "a crab", "style": "flat"} for n in ("a", "b")]
    write = (tmp_path / "metadata.jsonl").write_text
    write("\n".join(map(json.dumps, rows)))
    task = task_of(tmp_path, source="image_folder", root=str(tmp_path))
    assert next(task.loader)["ids"].shape == (16, 32)
    write("\n".join(map(json.dumps, [{**rows[0], "style": 3}, rows[1]])))
    with pytest.raises(DataError, match="1 pictures without a style: .*a.png"):
        task_of(tmp_path, source="image_folder", root=str(tmp_path))


def test_training_and_pipeline_read_pictures_and_texts_alike(tmp_path):
    loop.main(configs.pixart_style.get_config("smoke"), tmp_path / "run")
    pipe = cnxs_jax.load_pipeline(DEFAULT_MODEL, style=tmp_path / "run" / "export")
    task = task_of(tmp_path)
    raw = {k: v for k, v in next(task.loader).items() if isinstance(v, np.ndarray)}
    embeddings = jax.jit(task.encode)(task.encoders, raw, jax.random.key(0))["x"]
    np.testing.assert_allclose(pipe.embeddings(list(raw["image"])), embeddings, atol=1e-5)
    words = np.ones((1, 3, 128), np.float32)
    found = pipe._text(["a crab"], 1, words)
    captions = Captions(
        [{"caption": "a crab", "style": "flat"}], pipe.tokenizer, ", {} style", 3, 32
    )
    own = captions[0]
    text = pipe.components["text_encoder"]
    wanted = text.module.apply({"params": text.params}, own["ids"][None], own["mask"][None], words)
    np.testing.assert_array_equal(found["text_mask"][0, :32], own["mask"])
    np.testing.assert_allclose(found["text"][0, :6], wanted[0, :6], atol=1e-4)


def test_a_run_ends_with_what_the_pipeline_takes(tmp_path):
    loop.main(configs.pixart_style.get_config("smoke"), tmp_path / "run")
    pipe = cnxs_jax.load_pipeline(DEFAULT_MODEL, style=tmp_path / "run" / "export")
    picture = np.full((64, 64, 3), 0.5, np.float32)
    options = {"num_inference_steps": 1, "output_type": "np"}
    styled = pipe("a crab", style_image=picture, **options).images
    assert np.abs(styled - pipe("a crab", **options).images).max() > 1e-3
