"""BN statistics from data of one's own: every epoch trains, and the end is exact wherever it is."""

import copy

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import SWAWarning, update_bn
from tests.helpers.assertions import (
    Statistics,
    assert_bitwise,
    assert_statistics,
    assert_trains_on,
    assert_undisturbed,
    assert_weights,
)
from tests.helpers.callbacks import at, stop
from tests.helpers.data import batched, data, positions
from tests.helpers.devices import on
from tests.helpers.fits import fit
from tests.helpers.marks import ran_out
from tests.helpers.models import build, norm_of

pytestmark = pytest.mark.either_keras

X = data(40, seed=5)[0]  # other data than what is trained on


def ends_of(kit):
    """A callback that keeps the weights at the end of each epoch, before SWA sees that end."""

    class Ends(kit.keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.weights = []

        def on_epoch_begin(self, epoch, logs=None):
            self.weights.append(None)

        def on_train_batch_end(self, batch, logs=None):
            self.weights[-1] = kit.trainable(self.model)

        def mean(self, *epochs):
            """The float64 mean of the weights at the ends of epochs, counted from 1."""
            chosen = [self.weights[e - 1] for e in epochs]
            return [np.mean(np.float64(ws), 0) for ws in zip(*chosen, strict=True)]

    return Ends()


def assert_final(kit, model, ends, snapshots, x=X):
    assert_weights(kit.trainable(model), ends.mean(*snapshots))
    assert_statistics(kit, norm_of(model), positions(x))
    assert_undisturbed(kit, model)


@pytest.mark.exactness
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_epoch_trains_and_the_statistics_are_of_the_data(kit, replicas):
    model = build(kit, on(replicas))
    _, swa, history = fit(
        kit, model, before=[ends := ends_of(kit)], swa=kit.SWA(3, bn_data=X), epochs=5
    )
    assert swa.n_averaged == 3
    assert_final(kit, model, ends, [3, 4, 5])
    np.testing.assert_allclose(history["learning_rate"], [0.05] * 5)
    assert_trains_on(kit, model)


def several_kinds(kit):
    yield "array", X
    yield "array and targets", (X, np.zeros(len(X)))
    yield "dataset", batched(X, np.zeros(len(X)))
    yield "endless dataset", batched(X, size=20).repeat()

    class Items(getattr(kit.keras.utils, "PyDataset", kit.keras.utils.Sequence)):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return X[10 * i : 10 * i + 10], np.zeros(10)

    yield "sequence", Items()
    yield "list of batches", [(X[:20],), (X[20:],)]


@pytest.mark.parametrize("kind", ["array", "array and targets", "dataset", "endless dataset",
                                  "sequence"])  # fmt: skip
def test_any_data_that_can_be_read_again(kit, kind):
    model = build(kit)
    swa = kit.SWA(
        2, bn_data=dict(several_kinds(kit))[kind], bn_steps=2 if "endless" in kind else None
    )
    fit(kit, model, before=[ends := ends_of(kit)], swa=swa, epochs=3)
    assert_final(kit, model, ends, [2, 3])


@pytest.mark.parametrize(
    ("hook", "where"),
    [("on_train_batch_end", "before"), ("on_epoch_end", "before"), ("on_epoch_end", "after")],
)
def test_after_an_early_stop_there_is_no_further_epoch_wherever_the_callback_stands(
    kit, hook, where
):
    model = build(kit)
    swa = kit.SWA(2, bn_data=X)
    ends, callbacks = ends_of(kit), {"before": [], "after": []}
    callbacks[where] = [at(kit, 4, stop, hook)]
    callbacks["before"].append(ends)
    _, _, history = fit(kit, model, swa=swa, epochs=9, **callbacks)
    assert len(history["loss"]) == 4
    assert swa.n_averaged == 3
    assert_final(kit, model, ends, [2, 3, 4])


@ran_out
def test_when_the_data_run_out(kit):
    model, ends, swa = build(kit), ends_of(kit), kit.SWA(2, bn_data=X)
    fed = batched(*data()).repeat(3)
    fit(kit, model, before=[ends], swa=swa, epochs=5, fed=fed, steps_per_epoch=3)
    if kit.name == "tf_keras":  # which learns in epoch 4 that there are no more
        assert (len(ends.weights), ends.weights.pop()) == (4, None)
        ends.weights.append(ends.weights[-1])
    assert_final(kit, model, ends, range(2, len(ends.weights) + 1))


def test_validation_of_the_last_epoch_is_of_the_final_model(kit):
    model = build(kit)
    held_out = batched(*data(16, seed=3))
    ends = ends_of(kit)
    *_, history = fit(
        kit, model, before=[ends], swa=kit.SWA(2, bn_data=X), epochs=3, validation_data=held_out,
        fed=batched(*data()),
    )  # fmt: skip
    loss = model.evaluate(held_out, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)
    assert_final(kit, model, ends, [2, 3])


def test_each_validation_is_of_the_average_with_statistics_of_its_own(kit, two_replicas):
    """And training is bitwise what it is without."""
    held_out = batched(*data(16, seed=3))
    plain, model = build(kit, two_replicas), build(kit, two_replicas)
    without, *_ = fit(
        kit, plain, swa=kit.SWA(2, bn_data=X), epochs=4, validation_data=held_out,
        fed=batched(*data()),
    )  # fmt: skip
    seen, trained = [], []

    def look(epoch, logs):
        seen.append((kit.trainable(model), kit.statistics(norm_of(model)), logs["val_loss"]))

    def look_back(epoch, logs):
        trained.append([kit.replicas(v) for v in model.weights])

    swa = kit.SWA(2, bn_data=X, validate_average=True)
    after = kit.keras.callbacks.LambdaCallback(on_epoch_end=look, on_epoch_begin=look_back)
    fit(
        kit, model, swa=swa, epochs=4, after=[after], validation_data=held_out,
        fed=batched(*data()),
    )  # fmt: skip
    for epoch in (2, 3, 4):
        weights, statistics, loss = seen[epoch - 1]
        assert_weights(weights, without.mean(*range(2, epoch + 1)))
        other = build(kit)
        for variable, value in zip(other.trainable_variables, weights, strict=True):
            variable.assign(value)
        update_bn(other, X, batch_size=8)
        assert_weights(statistics, [s.astype("float64") for s in kit.statistics(norm_of(other))])
        assert other.evaluate(held_out, verbose=0) == pytest.approx(loss, rel=1e-5)
    for values, weights in zip(trained[1:], without.weights, strict=False):
        shown = [copies for v, copies in zip(model.weights, values, strict=True) if v.trainable]
        for copies, weight in zip(shown, weights, strict=True):
            assert_bitwise(copies, [weight] * len(copies))
    assert_weights(kit.trainable(model), without.mean(2, 3, 4))
    assert_statistics(kit, norm_of(model), positions(X))


def failing(n):
    """A dataset that fails at its n-th reading."""
    readings = []

    def batches():
        readings.append(1)
        yield X[:8]
        if len(readings) == n:
            raise OSError("the disk is gone")

    spec = tf.TensorSpec([None, 3], tf.float32)
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_exception_in_the_data_is_the_users_and_leaves_the_average(kit, stopped):
    model = build(kit, on(2 * stopped))
    ends, statistics = ends_of(kit), Statistics(kit, 2, 3)
    # Behind SWA, so that it is told of the end by `on_train_end` only.
    after = [at(kit, 3, stop)] * stopped
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        fit(
            kit, model, before=[ends, statistics.callback], swa=kit.SWA(2, bn_data=failing(1)),
            epochs=9 if stopped else 3, after=after, validation_data=data(16),
        )  # fmt: skip
    assert_weights(kit.trainable(model), ends.mean(2, 3))
    kit.assert_replicas_agree(model)
    if stopped:
        statistics.assert_averaged(kit, model)
    update_bn(model, X)  # the remedy: it leaves the weights alone
    assert_final(kit, model, ends, [2, 3])
    assert_trains_on(kit, model)


def test_what_else_a_forward_pass_writes_is_as_it_was(kit):
    """Neither random seeds nor a layer that rescales its own weights affect training or the end."""
    layers, ends = kit.keras.layers, []

    class Rescaled(layers.Dense):
        def call(self, inputs, training=False):
            if training:
                kernel = tf.convert_to_tensor(self.kernel)
                self.kernel.assign(kernel / tf.reduce_max(tf.abs(kernel)))
            return super().call(inputs)

    for validate_average in (False, True):
        kit.keras.utils.set_random_seed(7)
        model = kit.keras.Sequential(
            [
                *(layers.Input((3,)), Rescaled(4), layers.BatchNormalization()),
                *(layers.Dropout(0.3), layers.Dense(1)),
            ]
        )
        model.compile(kit.keras.optimizers.SGD(0.01), "mse", jit_compile=False)
        recorder = ends_of(kit)
        fit(
            kit, model, before=[recorder], epochs=4, validation_data=batched(*data(16, seed=3)),
            swa=kit.SWA(2, bn_data=X, validate_average=validate_average), fed=batched(*data()),
        )  # fmt: skip
        assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
        ends.append(recorder.weights)
    for one, other in zip(*ends, strict=True):
        assert_bitwise(one, other)


def test_without_bn_layers_it_has_no_effect_and_a_warning_says_so(kit):
    model = build(kit, norm=False)
    with pytest.warns(SWAWarning, match="`bn_data` has no effect"):
        recorder, *_ = fit(kit, model, swa=kit.SWA(2, bn_data=X), epochs=3)
    assert_weights(kit.trainable(model), recorder.mean(2, 3))


def test_the_progress_is_shown_if_asked_for(kit, capsys):
    model = build(kit)
    fit(kit, model, swa=kit.SWA(2, bn_data=X, verbose=1), epochs=3)
    printed = capsys.readouterr().out
    assert "Epoch 00003: running forward pass over `bn_data` to recompute batch norm" in printed
    assert "5/5" in printed  # 40 samples, in batches of 8
    assert "forward pass and will run with no learning rate" not in printed


@pytest.mark.parametrize(
    ("bn_data", "error", "message"),
    [
        ((x for x in [X]), ValueError, "can be read once"),
        (iter([X]), ValueError, "must be data that can be read from its beginning again"),
        (X[:0], ValueError, "`bn_data` must have samples"),
        (tf.data.Dataset.from_tensor_slices(X[:0]).batch(8), ValueError, "must have samples"),
        (
            tf.data.Dataset.from_tensors(X).repeat(),
            ValueError,
            "`bn_steps` must be an integer >= 1",
        ),
        (7, TypeError, "`bn_data` must be an array"),
        ("data", TypeError, "`bn_data` must be an array"),
    ],
)
def test_data_that_will_not_do_is_refused_at_once(kit, bn_data, error, message):
    with pytest.raises(error, match=message):
        kit.SWA(2, bn_data=bn_data)


def test_data_of_another_shape_is_refused_before_the_first_batch(kit):
    model, batches = build(kit), []
    watch = kit.keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batches.append(batch)
    )
    for wrong in (X[:, :2], batched(X[:, :2]), (X[..., None, None], None)):
        with pytest.raises(ValueError, match="`bn_data` must have inputs of the shapes that the m"):
            fit(kit, model, swa=kit.SWA(2, bn_data=wrong), before=[watch])
    assert not batches


def test_an_empty_dataset_whose_length_nobody_knows_leaves_the_average(kit):
    model, ends = build(kit), ends_of(kit)
    empty = batched(X).filter(lambda x: False)
    with pytest.raises(ValueError, match="`data` must have samples"):
        fit(kit, model, swa=kit.SWA(2, bn_data=empty), epochs=3, before=[ends])
    assert_weights(kit.trainable(model), ends.mean(2, 3))


def test_a_copy_shares_the_data(kit):
    swa = kit.SWA(2, bn_data=batched(X))
    twin = copy.deepcopy(swa)
    assert twin.options.bn_data is swa.options.bn_data
    assert "bn_data=<_BatchDataset>" in repr(twin)
