"""The last epoch: only BN statistics change."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_exact, assert_statistics
from tests.helpers.callbacks import at
from tests.helpers.data import batched, data, held_out, positions
from tests.helpers.devices import mirrored
from tests.helpers.fits import ONE_SNAPSHOT, fit
from tests.helpers.kit import KITS
from tests.helpers.marks import ran_out
from tests.helpers.models import RATE, build

pytestmark = pytest.mark.either_keras


def momentum(kit, **arguments):
    return kit.keras.optimizers.SGD(RATE, momentum=0.9, **arguments)


def optimizers(kit):
    for name in sorted(dir(kit.keras.optimizers)):
        candidate = getattr(kit.keras.optimizers, name)
        if not isinstance(candidate, type) or name.lower() in ("optimizer", "legacy"):
            continue
        if (name, kit.keras.__version__) == ("Muon", "3.10.0"):  # cannot train with TensorFlow
            continue
        if issubclass(candidate, kit.keras.optimizers.Optimizer):
            yield pytest.param(kit, name, id=f"{kit.name}-{name}")


@pytest.mark.parametrize(
    ("kit", "name"), [case for kit in KITS for case in optimizers(kit)], indirect=["kit"]
)
def test_no_optimizer_changes_anything(kit, name):
    def make():
        made = getattr(kit.keras.optimizers, name)
        if name == "SGD":
            return momentum(kit)
        if name == "LossScaleOptimizer":
            return made(momentum(kit))
        if name == "MultiOptimizer":
            return made(kit.keras.optimizers.OptimizerMap(momentum(kit)))
        return made(RATE)

    model = build(kit, optimizer=make)
    optimizer = model.optimizer
    recorder, *_ = fit(kit, model, **ONE_SNAPSHOT)
    assert int(kit.array(optimizer.iterations)) == 9
    moved = zip(recorder.weights[1], recorder.weights[2], strict=True)
    assert any((a != b).any() for a, b in moved)
    # One snapshot: its average is itself, bit by bit.
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(optimizer), recorder.states[2])


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_external_scheduler_changes_nothing_and_its_rate_is_kept(kit, order):
    model = build(kit)
    scheduler = kit.keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 * (epoch + 1))
    recorder, _, history = fit(kit, model, **{order: [scheduler]}, **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[2])
    # The pass ends itself, before any callback is told of its last batch.
    assert recorder.batch_rates[3] == [0.0, 0.0, pytest.approx(0.04)]
    assert kit.rate(model) == pytest.approx(0.04)
    np.testing.assert_allclose(history["learning_rate"][:3], [0.01, 0.02, 0.03], rtol=1e-6)


def test_a_learning_rate_schedule_is_zero_in_effect(kit):
    schedule = kit.keras.optimizers.schedules.ExponentialDecay(RATE, 3, 0.5)
    model = build(kit, optimizer=lambda: kit.keras.optimizers.SGD(schedule, momentum=0.9))
    recorder, _, history = fit(kit, model, **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[2])
    assert history["learning_rate"][3] == 0.0
    assert history["learning_rate"][2] > 0


def test_use_ema_does_not_overwrite_the_average(kit):
    model = build(kit, optimizer=lambda: momentum(kit, use_ema=True))
    recorder, *_ = fit(kit, model, **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])


def test_no_weight_travels_to_the_host(kit, two_replicas, monkeypatch):
    model = build(kit, two_replicas)
    eager = next(c for c in type(tf.constant(0)).__mro__ if "_numpy" in vars(c))
    sizes, original = [], eager._numpy

    def spy(self):
        array = original(self)
        sizes.append(np.size(array))
        return array

    monkeypatch.setattr(eager, "_numpy", spy)
    model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[kit.SWA(2)])
    assert sizes
    assert max(sizes) <= 2  # rates, counts, losses; tf.data's own list of two parts of a batch
    model.get_weights()
    assert max(sizes) == 3  # the spy sees


def test_the_step_is_forward_only(kit, two_replicas):
    with two_replicas.scope():
        allowed = tf.Variable(1, trainable=False)

    @tf.custom_gradient
    def identity(x):
        def backward(upstream):
            # A stateless operation that fails if it runs after `allowed` was taken away.
            ones = tf.ensure_shape(tf.ones(tf.reshape(allowed, [1])), [1])
            return upstream * ones[0]

        return tf.identity(x), backward

    class Watched(kit.keras.layers.Layer):
        def call(self, inputs):
            return identity(inputs)

    with two_replicas.scope():
        inputs = kit.keras.layers.Input((3,))
        x = kit.keras.layers.BatchNormalization()(inputs)
        x = Watched()(kit.keras.layers.Dense(4)(x))
        model = kit.keras.Model(inputs, kit.keras.layers.Dense(1)(x))
        model.compile("sgd", "mse", jit_compile=False)
    taken = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: allowed.assign(1 if epoch < 3 else 2)
    )
    fit(kit, model, [taken], **ONE_SNAPSHOT)
    with pytest.raises(tf.errors.InvalidArgumentError):  # the trap works
        model.fit(*data(), batch_size=8, verbose=0)


@pytest.mark.parametrize("own_step", [False, True])
def test_gradients_are_computed_for_a_training_step_of_the_users_only(kit, own_step):
    """For Keras's own, which does nothing else with them, they are not even traced."""
    epoch_of_traces = []

    @tf.custom_gradient
    def identity(x):
        def backward(upstream):
            epoch_of_traces.append(epochs[-1])
            return upstream

        return tf.identity(x), backward

    class Watched(kit.keras.layers.Layer):
        def call(self, inputs):
            return identity(inputs)

    class Own(kit.keras.Sequential):
        def train_step(self, fed):
            return super().train_step(fed)

    layers, epochs = kit.keras.layers, []
    model = (Own if own_step else kit.keras.Sequential)(
        [
            layers.Input((3,)),
            layers.BatchNormalization(),
            layers.Dense(4),
            Watched(),
            layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse", jit_compile=False)
    note = kit.keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, logs: epochs.append(e + 1))
    fit(kit, model, [note], **ONE_SNAPSHOT)
    assert set(epoch_of_traces) == ({1, 4} if own_step else {1})


def counting(kit, strategy):
    class Counting(kit.keras.Sequential):
        traces = 0

        def train_step(self, fed):
            Counting.traces += 1
            return super().train_step(fed)

    with strategy.scope():
        layers = [kit.keras.layers.Dense(2), kit.keras.layers.BatchNormalization()]
        model = Counting([kit.keras.layers.Input((3,)), *layers, kit.keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
    return model, Counting


def test_it_adds_one_trace_and_retraces_nothing(kit, two_replicas):
    fed = batched(*data())
    model, plain = counting(kit, two_replicas)
    model.fit(fed, shuffle=False, verbose=0)
    model, averaged = counting(kit, two_replicas)
    fit(kit, model, fed=fed, **ONE_SNAPSHOT)
    assert averaged.traces == plain.traces + 2  # one trace, a call for each replica
    fit(kit, model, fed=fed, **ONE_SNAPSHOT)
    assert averaged.traces == plain.traces + 4
    model.fit(fed, shuffle=False, verbose=0)
    assert averaged.traces == plain.traces + 4


def test_validation_and_checkpoints_of_the_last_epoch_are_of_the_final_model(
    kit, two_replicas, tmp_path
):
    model = build(kit, two_replicas)
    path = str(tmp_path / "model.keras")
    checkpoint = kit.keras.callbacks.ModelCheckpoint(path)
    held_out = batched(*data())
    *_, history = fit(
        kit,
        model,
        after=[checkpoint],
        validation_data=held_out,
        validation_freq=[4],
        **ONE_SNAPSHOT,
    )
    assert history["val_loss"][-1] == pytest.approx(
        model.evaluate(held_out, verbose=0), rel=1e-6, abs=0
    )
    saved = kit.keras.models.load_model(path)
    assert_bitwise(saved.get_weights(), model.get_weights())
    assert kit.rate(saved) == pytest.approx(0.05)


def test_the_model_gets_back_what_it_trained_with(kit):
    def functions(model):
        return [vars(model).get(name) for name in ("train_function", "train_tf_function")]

    model, before = build(kit), []
    keep = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: before.append(functions(model))
    )
    fit(kit, model, after=[keep], **ONE_SNAPSHOT)
    assert all(a is b for a, b in zip(functions(model), before[2], strict=True))
    assert all(a is b for a, b in zip(functions(model), before[3], strict=True))


def test_several_optimizers_change_nothing(kit, two_replicas):
    keras = kit.keras

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(2), keras.layers.Dense(1)
            self.norm = keras.layers.BatchNormalization()
            self.others = {"second": [keras.optimizers.Adam(0.1)]}

        def call(self, inputs, training=None):
            return self.second(self.norm(self.first(inputs), training=training))

        def train_step(self, fed):
            x, y = fed
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            pairs = ((self.first, self.optimizer), (self.second, self.others["second"][0]))
            for part, optimizer in pairs:
                grads = tape.gradient(loss, part.trainable_variables)
                optimizer.apply_gradients(zip(grads, part.trainable_variables, strict=True))
            return {"loss": loss}

    with two_replicas.scope():
        model = Two()
        model(data()[0])
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), jit_compile=False)
    adam = model.others["second"][0]
    states = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            states.append(kit.optimizer_state(adam))

    recorder, *_ = fit(kit, model, [Keep()], **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(adam), states[2])
    assert int(kit.array(adam.iterations)) == 9


def test_a_callback_that_restores_weights_before_swa_changes_nothing(kit):
    model = build(kit)
    stopping = kit.keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
    recorder, *_ = fit(kit, model, [stopping], **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_statistics(kit, model.layers[0], positions(data()[0]))


def test_training_inside_the_pass_ends_it_with_a_warning(kit):
    model = build(kit)

    class Nested(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                self.model.train_on_batch(*data())

    with pytest.warns(UserWarning, match="statistics were not recomputed"):
        fit(kit, model, after=[Nested()], **ONE_SNAPSHOT)
    assert kit.rate(model) == pytest.approx(0.05)


@pytest.mark.parametrize("how", ["run_eagerly", "jit_compile", "steps_per_execution"])
def test_other_ways_to_run_the_step(kit, how):
    model = build(kit, **{how: 2 if how == "steps_per_execution" else True})
    recorder, swa, history = fit(kit, model, **ONE_SNAPSHOT)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_statistics(kit, model.layers[0], positions(data()[0]))
    assert swa.inferred_batch_size == 8
    assert history["learning_rate"][3] == 0.0


@ran_out
def test_static_batches_are_not_counted_twice_at_the_end_of_the_data(kit, two_replicas):
    model = build(kit, two_replicas)
    x, _ = data()
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8, drop_remainder=True)
    fed = fed.filter(lambda x, y: True)  # of unknown length: its end is found by running into it
    fit(kit, model, fed=fed, **ONE_SNAPSHOT)
    assert_statistics(kit, model.layers[0], positions(x))


@ran_out
def test_data_of_unknown_length_leaves_the_optimizer_alone_at_the_end_of_the_pass(kit):
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).filter(lambda x, y: True)
    model = build(kit)
    recorder, *_ = fit(kit, model, epochs=5, fed=fed)
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[3])
    assert_exact(kit, model, recorder, [2, 3, 4])


@ran_out
def test_a_pass_that_ends_within_one_execution_of_the_step(kit):
    model = build(kit, steps_per_execution=8)
    x, y = data()
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(3).repeat(4)
    rest = tf.data.Dataset.from_tensor_slices((x[:9], y[:9])).batch(3)
    fed = whole.concatenate(rest)
    recorder, *_ = fit(kit, model, epochs=5, fed=fed, steps_per_epoch=8)
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(x[:9]))


def test_the_bn_pass_sees_all_of_a_growing_sequence(kit):
    base = kit.keras.utils.PyDataset if kit.name == "keras3" else kit.keras.utils.Sequence

    class Growing(base):
        def __init__(self):
            super().__init__()
            self.length = 2

        def __len__(self):
            return self.length

        def __getitem__(self, i):
            x, y = data()
            return x[4 * i : 4 * i + 4].copy(), y[4 * i : 4 * i + 4].copy()

        def on_epoch_end(self):
            self.length = min(self.length + 1, 6)

    model = build(kit)
    tap = []
    count = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: tap.append(0),
        on_train_batch_end=lambda batch, logs: tap.__setitem__(-1, tap[-1] + 1),
    )
    recorder, *_ = fit(kit, model, [count], fed=Growing(), epochs=5)
    assert tap[-1] == (2 if kit.name == "keras3" else 6)  # Keras 3 keeps the first length
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[3])
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][: 4 * tap[-1]]))


@pytest.mark.parametrize(("n", "steps"), [(1, 5), (2, 2)])
def test_the_bn_pass_takes_so_many_batches(kit, n, steps):
    model = build(kit, mirrored(n))
    swa = kit.SWA(2, bn_steps=steps)
    recorder, _, history = fit(kit, model, swa=swa, epochs=4, validation_data=held_out())
    assert len(history["loss"]) == 4
    assert not model.stop_training
    assert history["val_loss"][-1] == pytest.approx(model.evaluate(held_out(), verbose=0), rel=1e-5)
    seen = data()[0][: 8 * steps].astype("float64")
    assert_exact(kit, model, recorder, [2, 3], seen=seen)


@pytest.mark.parametrize("steps", [None, 2])
def test_the_bn_pass_ends_with_the_execution_of_its_last_batch(kit, steps):
    model, seen = build(kit, steps_per_execution=2), []
    look = at(kit, 4, lambda model: seen.extend([*model.get_weights(), kit.rate(model)]))
    fed = data(32)
    recorder, *_ = fit(kit, model, [look], fed=fed, swa=kit.SWA(2, bn_steps=steps), epochs=4)
    assert_bitwise(seen, [*model.get_weights(), np.float64(kit.rate(model))])
    used = fed[0][: 8 * steps] if steps else fed[0]
    assert_exact(kit, model, recorder, [2, 3], seen=used.astype("float64"))
