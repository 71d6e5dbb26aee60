"""LoRA trees: fresh ones change nothing, merging is W + s A B, training moves the factors alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnxs_jax import lora, tree
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.dit import PixArt

SHAPES = {
    "blocks/to_q/kernel": (3, 6, 8),
    "blocks/to_q/bias": (3, 8),
    "blocks/scale_shift_table": (3, 6, 8),
    "conv/proj/kernel": (3, 3, 4, 5),
    "out/linear/kernel": (6, 4),
    "out/linear/bias": (4,),
}
KERNELS = [path for path in SHAPES if path.endswith("kernel")]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return tree.unflatten(
        {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}
    )


def filled(adapter, seed=1):
    rng = np.random.default_rng(seed)
    return tree.map_with_path(
        lambda p, v: v if p.endswith("scale") else jnp.asarray(rng.normal(size=v.shape), v.dtype),
        adapter,
    )


def test_a_fresh_adapter_changes_no_bit(params):
    adapter = lora.init(params, ".*", 2, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapter), params)
    assert set(lora.modules(adapter)) == {p.removesuffix("/kernel") for p in KERNELS}
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    merged = lora.merge(halves, adapter)
    assert {v.dtype for v in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, merged, halves)


def test_a_is_uniform_like_pytorchs(params):
    """Within +-1/sqrt(fan in), filling that range, each layer and module on its own."""
    adapter = lora.modules(lora.init(params, ".*", 64, jax.random.key(0)))
    for path, fan_in in (("blocks/to_q", 6), ("conv/proj", 36), ("out/linear", 6)):
        a = np.asarray(adapter[path]["lora_A"])
        assert 0.95 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5
    assert not np.array_equal(adapter["blocks/to_q"]["lora_A"][0], adapter["out/linear"]["lora_A"])


def test_each_layer_and_each_tap_has_its_own_update(params):
    adapter = filled(lora.init(params, ".*", 2, jax.random.key(0), alpha=6))
    merged = tree.flatten(lora.merge(params, adapter, 0.5))
    before, parts = tree.flatten(params), lora.modules(adapter)
    strength = 0.5 * 6 / 2

    def change(path, *index):
        return np.asarray(merged[path] - before[path], np.float64)[index]

    q = {k: np.asarray(v, np.float64) for k, v in parts["blocks/to_q"].items()}
    expected = strength * np.tensordot(q["lora_A"][1], q["lora_B"][1], 1)
    np.testing.assert_allclose(change("blocks/to_q/kernel", 1), expected, atol=1e-5)
    conv = {k: np.asarray(v, np.float64) for k, v in parts["conv/proj"].items()}
    expected = strength * np.tensordot(conv["lora_A"][2, 1], conv["lora_B"], 1)
    np.testing.assert_allclose(change("conv/proj/kernel", 2, 1), expected, atol=1e-5)
    for path in set(SHAPES) - set(KERNELS):
        np.testing.assert_array_equal(merged[path], before[path])


def test_several_with_weights_and_back(params):
    one = filled(lora.init(params, r"blocks/.*", 2, jax.random.key(0)))
    two = filled(lora.init(params, r"(blocks|out)/.*", 3, jax.random.key(1)), seed=2)
    both = lora.merge(params, [one, two], [0.7, -0.2])
    alone = lora.merge(lora.merge(params, one, 0.7), two, -0.2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, alone)
    back = lora.unmerge(both, [one, two], [0.7, -0.2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)
    assert np.abs(both["out"]["linear"]["kernel"] - params["out"]["linear"]["kernel"]).max() > 0.1


def test_training_moves_the_factors_and_not_the_scale(params):
    adapter = lora.init(params, r"out/linear/kernel", 2, jax.random.key(0), alpha=1)
    tx = optax.adamw(0.1, weight_decay=0.0)
    target = jnp.ones((6, 4))

    @jax.jit
    def step(adapter, state):
        def loss(adapter):
            kernel = lora.merge(params, adapter)["out"]["linear"]["kernel"]
            return jnp.square(kernel - target).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, trained, losses = tx.init(adapter), adapter, []
    for _ in range(100):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.75 * losses[0]
    assert float(trained["out"]["linear"]["scale"]) == 0.5
    # rank 2 of 4: what is left is at least the two smallest singular values
    rest = np.linalg.svd(np.asarray(target - params["out"]["linear"]["kernel"]))[1]
    floor = np.square(rest[2:]).sum() / target.size
    assert floor - 1e-6 <= losses[-1] <= 1.1 * floor


def test_pixart_targets_are_every_linear_layer():
    module = PixArt(sample_size=128)
    cond = {
        "text": jnp.zeros((1, 1, 4096)),
        "size": jnp.zeros((1, 2)),
        "aspect": jnp.zeros((1, 1)),
    }
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 2, 2, 4)), jnp.zeros(1), cond
    )["params"]
    adapter = jax.eval_shape(
        lambda k: lora.init(shapes, lora.PIXART_TARGETS, 32, k), jax.random.key(0)
    )
    kernels = [p for p in tree.flatten(shapes) if p.endswith("/kernel")]
    assert len(lora.modules(adapter)) == len(kernels)
    assert lora.size(adapter) < 0.05 * tree.size(shapes)


@pytest.mark.parametrize(
    ("targets", "rank", "words"),
    [
        ("blocks/to_z/kernel", 2, "matches no parameter"),
        (r".*bias", 2, "matches no parameter"),
        ("(", 2, "not a regular expression"),
        (".*", 0, "rank 0"),
        (".*", 2.0, "rank 2.0"),
    ],
)
def test_bad_targets(params, targets, rank, words):
    with pytest.raises(ConfigError, match=words):
        lora.init(params, targets, rank, jax.random.key(0))


def test_trees_of_other_models_are_refused(params):
    adapter = lora.init(params, r"out/.*", 2, jax.random.key(0))
    with pytest.raises(ConfigError, match="no out/linear/kernel"):
        lora.merge({"blocks": params["blocks"]}, adapter)
    wide = {"out": {"linear": {"kernel": jnp.zeros((6, 9))}}}
    with pytest.raises(ConfigError, match=r"\(6, 2\) and \(2, 4\) for a kernel \(6, 9\)"):
        lora.merge(wide, adapter)
    with pytest.raises(ConfigError, match="1 scales for 2"):
        lora.merge(params, [adapter, adapter], [1.0])
