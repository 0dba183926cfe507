"""Snapshots by steps, against the weights after each step."""

import re
import warnings

import numpy as np
import pytest

from swa_dist import SWAWarning
from tests.helpers.assertions import (
    RELATIVE_OF_TRAINING,
    assert_bitwise,
    assert_statistics,
    assert_undisturbed,
    assert_weights,
)
from tests.helpers.data import batched, data, positions
from tests.helpers.devices import on
from tests.helpers.fits import fit
from tests.helpers.models import build, norm_of, poison

pytestmark = pytest.mark.either_keras

STEPS = 3  # in an epoch


def steps_of(kit):
    """A callback that keeps the weights after each step, the n_averaged after each epoch."""

    class Steps(kit.keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.weights, self.counts = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.weights.append(kit.trainable(self.model))

        def mean(self, start, every, last, momentum=None):
            """The definition, of steps counted from the beginning of epoch `start`."""
            first, end = (start - 1) * STEPS, last * STEPS
            chosen = self.weights[first + every - 1 : end : every]
            shares = [(momentum or 1) ** (len(chosen) - k) for k in range(1, len(chosen) + 1)]
            return len(chosen), [
                sum(s * np.float64(w) for s, w in zip(shares, ws, strict=True)) / sum(shares)
                for ws in zip(*chosen, strict=True)
            ]

    return Steps()


def counts_of(kit, swa):
    counts = []
    callback = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(swa.n_averaged)
    )
    return counts, callback


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("replicas", "every", "start", "momentum"),
    [(0, 1, 2, None), (1, 4, 1, None), (2, 2, 3, None), (2, 1, 2, 0.9), (4, 5, 2, 0.5)],
)
def test_every_nth_step_enters_the_average(kit, replicas, every, start, momentum):
    model = build(kit, on(replicas))
    steps, swa = steps_of(kit), kit.SWA(start, snapshot_freq=every, ema_momentum=momentum)
    counts, counter = counts_of(kit, swa)
    fit(kit, model, before=[steps], after=[counter], swa=swa, epochs=6)
    n, expected = steps.mean(start, every, 5, momentum)
    assert swa.n_averaged == n
    assert counts == [max(0, (e - start + 1) * STEPS // every) for e in range(1, 6)] + [n]
    assert_weights(kit.trainable(model), expected)
    assert_statistics(kit, norm_of(model), positions(data()[0]))
    assert_undisturbed(kit, model)
    before = kit.trainable(model)
    fit(kit, model, epochs=4, fed=batched(*data()))
    assert swa.n_averaged == n
    assert any((a != b).any() for a, b in zip(before, kit.trainable(model), strict=True))


@pytest.mark.parametrize("per_execution", [2, 3, 6])
def test_with_several_steps_in_an_execution_it_is_still_every_nth(kit, per_execution):
    """Also where a whole epoch, or more, is one execution, and where the last has fewer steps."""
    strategy = on(2 if per_execution == 2 else 0)
    single, several = (
        build(kit, strategy, norm=False, steps_per_execution=n) for n in (1, per_execution)
    )
    fed = batched(*data(40))  # 5 steps
    steps = steps_of(kit)
    fit(kit, single, before=[steps], swa=kit.SWA(2, snapshot_freq=2), epochs=3, fed=fed)
    swa = kit.SWA(2, snapshot_freq=2)
    fit(kit, several, swa=swa, epochs=3, fed=fed)
    chosen = steps.weights[5 + 1 :: 2]
    assert swa.n_averaged == len(chosen) == 5
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*chosen, strict=True)]
    assert_weights(kit.trainable(single), expected)
    assert_weights(kit.trainable(several), expected, RELATIVE_OF_TRAINING)


def test_without_bn_the_last_epochs_steps_are_averaged_before_its_validation(kit, two_replicas):
    model = build(kit, two_replicas, norm=False)
    steps, swa = steps_of(kit), kit.SWA(2, snapshot_freq=2)
    held_out = batched(*data(16, seed=3))
    *_, history = fit(
        kit,
        model,
        before=[steps],
        swa=swa,
        epochs=3,
        validation_data=held_out,
        fed=batched(*data()),
    )
    n, expected = steps.mean(2, 2, 3)
    assert swa.n_averaged == n == 3
    assert_weights(kit.trainable(model), expected)
    loss = model.evaluate(held_out, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)


def test_before_the_start_the_step_is_as_it_was_and_training_is_not_affected(kit):
    models = [build(kit, norm=False) for _ in range(2)]
    functions = []

    def note(model):
        return kit.keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: functions.append(
                type(model.train_function).__name__
            )
        )

    steps = [steps_of(kit) for _ in models]
    swas = [kit.SWA(3, snapshot_freq=1), kit.SWA(3)]
    for model, step, swa in zip(models, steps, swas, strict=True):
        fit(kit, model, before=[step, note(model)], swa=swa, epochs=4)
    for a, b in zip(steps[0].weights, steps[1].weights[: 4 * STEPS - 1], strict=False):
        assert_bitwise(a, b)
    assert functions[: 4 * STEPS] == ["SampleCounter"] * 2 * STEPS + ["StepSnapshots"] * 2 * STEPS
    assert set(functions[4 * STEPS :]) == {"SampleCounter"}
    assert type(models[0].train_function).__name__ == "SampleCounter"


def test_batches_of_another_callback_neither_count_nor_end_the_snapshots(kit):
    model = build(kit)
    swa, counts = kit.SWA(2, snapshot_freq=1), []

    def act(batch, logs):
        if batch == 0 and len(counts) < 3 * STEPS:
            model.train_on_batch(*data(8, seed=1))
        counts.append(swa.n_averaged)

    other = kit.keras.callbacks.LambdaCallback(on_train_batch_end=act)
    fit(kit, model, after=[other], swa=swa, epochs=4)
    assert counts == [0, 0, 0, *range(1, 7), 6, 6, 6]  # also within an epoch
    assert swa.n_averaged == 6


def test_an_early_stop_is_followed_by_the_pass_and_the_step_counts_no_more(kit):
    model = build(kit)
    steps, swa = steps_of(kit), kit.SWA(2, snapshot_freq=2)
    stop = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 3)
    )
    fit(kit, model, before=[steps, stop], swa=swa, epochs=9)
    n, expected = steps.mean(2, 2, 4)
    assert swa.n_averaged == n == 4
    assert_weights(kit.trainable(model), expected)
    assert_statistics(kit, norm_of(model), positions(data()[0]))


def test_the_average_survives_an_exception_within_an_epoch_and_later_fits_leave_it_alone(kit):
    model = build(kit)
    steps, swa = steps_of(kit), kit.SWA(1, snapshot_freq=1)

    def fail(batch, logs):
        if len(steps.weights) == 2 * STEPS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            kit, model, before=[steps], swa=swa, epochs=9,
            after=[kit.keras.callbacks.LambdaCallback(on_train_batch_end=fail)],
        )  # fmt: skip
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*steps.weights, strict=True)]
    assert swa.n_averaged == 7
    with swa.averaged_weights():
        assert_weights(kit.trainable(model), expected)
    model.fit(*data(), batch_size=8, verbose=0)
    assert type(model.train_function).__name__ == "SampleCounter"
    with swa.averaged_weights():
        assert_weights(kit.trainable(model), expected)


def test_snapshots_that_are_not_finite_are_left_out_and_counted(kit):
    model = build(kit, norm=False)
    steps, swa = steps_of(kit), kit.SWA(2, snapshot_freq=1)

    def spoil(batch, logs):
        if len(steps.weights) == 5:
            poison(model)

    spoiler = kit.keras.callbacks.LambdaCallback(on_train_batch_end=spoil)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kit, model, before=[steps, spoiler], swa=swa, epochs=3)
    assert swa.n_averaged == 2
    first, second = (str(w.message) for w in caught if w.category is SWAWarning)
    assert "Left out of the average: 1 of 3 snapshots of epoch 2" in first
    assert "Left out of the average: 3 of 3 snapshots of epoch 3" in second
    for message in (first, second):
        assert re.search("still not finite is '.*kernel.*'. Likely cause: training has", message)
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*steps.weights[3:5], strict=True)]
    assert_weights(kit.trainable(model), expected)


def test_compiled_steps(kit):
    ends = []
    for jit_compile in (False, True):
        model = build(kit, jit_compile=jit_compile)
        swa = kit.SWA(2, snapshot_freq=2, ema_momentum=0.9)
        fit(kit, model, swa=swa, epochs=4)
        assert swa.n_averaged == 3
        ends.append(kit.trainable(model))
    assert_weights(ends[1], [w.astype(np.float64) for w in ends[0]], RELATIVE_OF_TRAINING)


def test_mixed_precision(kit, two_replicas):
    kit.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = build(kit, two_replicas)
    finally:
        kit.keras.mixed_precision.set_global_policy("float32")
    steps, swa = steps_of(kit), kit.SWA(2, snapshot_freq=2)
    fit(kit, model, before=[steps], swa=swa, epochs=4)
    n, expected = steps.mean(2, 2, 3)
    assert swa.n_averaged == n == 3
    assert_weights(kit.trainable(model), expected)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3, after epoch 1
def test_data_of_unknown_length(kit):
    model = build(kit)
    steps, swa = steps_of(kit), kit.SWA(2, snapshot_freq=4)
    fed = batched(*data()).filter(lambda *batch: True)
    fit(kit, model, before=[steps], swa=swa, epochs=5, fed=fed)
    n, expected = steps.mean(2, 4, 4)
    assert swa.n_averaged == n == 2
    assert_weights(kit.trainable(model), expected)


def test_a_model_that_is_not_built_is_refused_before_the_first_batch(kit):
    model = kit.keras.Sequential([kit.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    batches = []
    watch = kit.keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batches.append(batch)
    )
    with pytest.raises(ValueError, match="`model` must be built before the epoch in which"):
        fit(kit, model, before=[watch], swa=kit.SWA(1, snapshot_freq=1), recorder=watch)
    assert not batches

    class Partly(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = (kit.keras.layers.Dense(3) for _ in range(2))
            self.first.build((None, 3))

        def call(self, inputs):
            return self.second(self.first(inputs))

    partly = Partly()
    partly.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`model` must be built before the epoch in which"):
        fit(kit, partly, recorder=watch, swa=kit.SWA(1, snapshot_freq=1))
    swa = kit.SWA(2, snapshot_freq=1)
    fit(kit, model, recorder=watch, swa=swa, epochs=3)
    assert swa.n_averaged == 2 * STEPS


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3, after epoch 1
def test_too_few_steps_are_an_error_before_the_first_batch_or_a_warning_at_the_end(kit):
    model = build(kit)
    swa = kit.SWA(4, snapshot_freq=7)
    with pytest.raises(ValueError, match="`snapshot_freq` must leave room for at least one") as e:
        fit(kit, model, swa=swa, epochs=6)
    assert "trains 6 steps from epoch 4 to 5" in str(e.value)
    fed = batched(*data()).filter(lambda *batch: True)
    with pytest.warns(UserWarning, match="first snapshot at training step 7, counted from epoch 4"):
        fit(kit, model, swa=swa, epochs=6, fed=fed)
