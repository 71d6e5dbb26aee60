"""The contrastive loss of a pair of encoders, and which configs it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.scene_clip
from cnxs_jax.errors import ConfigError
from train import loop, validate
from train.tasks_clip import pairs_loss

UNIT = jnp.eye(4, 6)


def test_matching_pairs_have_no_loss_and_strangers_have_log_batch():
    loss, metrics = pairs_loss(3.0 * UNIT, 0.1 * UNIT, jnp.log(100.0))
    assert float(loss) < 1e-5  # lengths do not matter
    assert metrics == {"text_to_image": 1.0, "image_to_text": 1.0}
    loss, _ = pairs_loss(jnp.ones((4, 6)), UNIT, jnp.log(1.0))
    assert float(loss) == pytest.approx(np.log(4), rel=1e-5)
    turned, metrics = pairs_loss(UNIT, jnp.roll(UNIT, 1, axis=0), jnp.log(10.0))
    assert float(turned) == pytest.approx(10.0, abs=0.01)
    assert metrics["text_to_image"] == 0.0


def test_both_directions_count_and_the_temperature_is_capped():
    texts = jax.random.normal(jax.random.key(0), (5, 3))
    images = jax.random.normal(jax.random.key(1), (5, 3))
    one, _ = pairs_loss(texts, images, 1.0)
    other, _ = pairs_loss(images, texts, 1.0)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    hot, _ = pairs_loss(texts, images, jnp.log(100.0))
    hotter, _ = pairs_loss(texts, images, jnp.log(5000.0))
    assert float(hot) == pytest.approx(float(hotter), rel=1e-4)


def test_equal_captions_are_no_mismatch():
    texts = UNIT.at[1].set(UNIT[0])
    images = UNIT.at[1].set(UNIT[0])
    same = jnp.eye(4, dtype=bool).at[0, 1].set(True).at[1, 0].set(True)
    loss, metrics = pairs_loss(texts, images, jnp.log(100.0), same)
    assert float(loss) < 1e-5
    assert metrics["text_to_image"] == 1.0
    without, _ = pairs_loss(texts, images, jnp.log(100.0))
    assert float(without) == pytest.approx(np.log(2) / 2, rel=1e-3)
    grads = jax.grad(lambda t: pairs_loss(t, images, jnp.log(100.0), same)[0])(texts)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (None, {"grad_accum": 2}, "compares all pairs of a batch"),
        ("text_encoder", {"projection_dim": 8}, "texts have 8 channels, pictures 16"),
    ],
)
def test_bad_configs_are_named(key, change, message):
    config = configs.scene_clip.get_config("smoke")
    (config if key is None else config[key]).update(change)
    with pytest.raises(ConfigError, match=message):
        validate.check(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab_size": 50}, "vocab_size 50 is less"), ({"eos_token_id": 2}, "ends with 1")],
)
def test_encoders_that_do_not_fit_the_tokenizer_are_named(change, message, tmp_path):
    config = loop.expand(configs.scene_clip.get_config("smoke"), tmp_path)
    config.text_encoder.update(change)
    with pytest.raises(ConfigError, match=message):
        loop.build_task(config)
