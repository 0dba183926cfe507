import numpy as np
import pytest
import tensorflow as tf

from scripts.bench import clock, exactness, isolated, networks, report
from tests.tolerances import assert_mean, assert_variance


def test_definition_of_the_statistics_agrees_with_keras():
    keras = tf.keras
    weights = networks.small_weights(seed=1)
    rng = np.random.default_rng(1)
    for layer in (1, 3):
        weights[layer][0] = rng.uniform(0.5, 2, len(weights[layer][0])).astype("float32")
        weights[layer][1] = rng.normal(size=len(weights[layer][1])).astype("float32")
    shards = [rng.normal(size=(n, 8, 8, 1)).astype("float32") for n in (7, 3)]
    model = networks.small(keras)
    networks.set_by_layer(model, weights)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    fed = keras.Model(model.input, [convolution.output for convolution in convolutions])
    each = [[np.array(t, "float64") for t in fed(shard, training=True)] for shard in shards]

    found = networks.small_statistics(weights, shards)

    for (mean, variance), inputs in zip(found, zip(*each, strict=True), strict=True):
        rows = np.concatenate([t.reshape(-1, t.shape[-1]) for t in inputs])
        assert_mean(rows.mean(0), mean, np.sqrt(variance))
        assert_variance(rows.var(0), variance)


def test_exactness_sees_a_weight_that_is_off_by_a_thousandth(tmp_path):
    class Off(exactness.Ours):
        def finish(self, model, batches):
            kernel = model.trainable_variables[0]
            kernel.assign(kernel * 1.001)

    exactness.write_digits(tmp_path / "digits.npz")

    errors = exactness.errors(Off(), 1, "SGD", str(tmp_path / "digits.npz"))

    assert errors["weights"] == pytest.approx(1e-3, rel=1e-2)
    assert errors["variance"] == pytest.approx(2e-3, rel=1e-2)
    assert errors["snapshots"] == exactness.TRAINED - exactness.START + 1


def test_contenders_take_turns():
    calls = []

    times = clock.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=2
    )

    assert calls == ["a", "b"] * 5
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def fails():
    raise ValueError("first line\nsecond line")


def test_errors_of_another_process_come_home():
    with pytest.raises(isolated.FailedError, match=r"^ValueError: first line$"):
        isolated.call(fails)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.01234, "0.012"),
        (1.2345, "1.23"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (1.234e-7, "1.2e-07"),
        (float("nan"), "nan"),
    ],
)
def test_at_most_three_digits_and_decimals_are_shown(value, shown):
    assert report.digits(value) == shown


def test_spread_is_the_median_and_the_quartiles():
    assert report.Spread.of([5, 1, 2, 3, 4]) == report.Spread(3.0, 2.0, 4.0, 5)


def test_table_survives_what_is_in_its_cells():
    lines = report.table(["a"], [["x|y\nz"]]).splitlines()

    assert lines == ["| a |", "| --- |", "| x\\|y z |"]
