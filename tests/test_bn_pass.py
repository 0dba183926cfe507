"""The last epoch: only BN statistics change, whatever happens."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import mirrored, with_renorm
from tests.fits import NO_STRATEGY, data
from tests.kits import KITS, batched, positions
from tests.tolerances import assert_bitwise, assert_mean, assert_variance, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")


def sgd(optimizers):
    return optimizers.SGD(0.05)


def momentum(optimizers):
    return optimizers.SGD(0.05, momentum=0.9)


def build(kit, strategy=NO_STRATEGY, make_optimizer=sgd, **compile_arguments):
    with strategy.scope():
        model = kit.keras.Sequential(
            [
                kit.keras.layers.Input((3,)),
                kit.keras.layers.BatchNormalization(),
                kit.keras.layers.Dense(1),
            ]
        )
        model.compile(
            make_optimizer(kit.keras.optimizers),
            "mse",
            **{"jit_compile": False, **compile_arguments},
        )
    return model


def fit(kit, model, callbacks=(), epochs=4, **arguments):
    """Three epochs of training, of which the third is averaged, and the BN pass."""
    recorder, swa = kit.Recorder(), kit.SWA(start_epoch=3)
    before, after = (
        ([*callbacks], []) if not isinstance(callbacks, tuple) else callbacks or ([], [])
    )
    if not arguments.keys() & {"x"}:
        arguments["x"], arguments["y"] = data()
        arguments["batch_size"] = 8
    history = model.fit(
        epochs=epochs, verbose=0, callbacks=[*before, recorder, swa, *after], **arguments
    )
    return recorder, swa, history.history


def assert_statistics(kit, layer, seen):
    mean, variance = kit.statistics(layer)
    assert_mean(mean.ravel(), seen.mean(0), seen.std(0))
    assert_variance(variance.ravel(), seen.var(0))


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
    def make(optimizers):
        made = getattr(optimizers, name)
        if name == "SGD":
            return momentum(optimizers)
        if name == "LossScaleOptimizer":
            return made(momentum(optimizers))
        if name == "MultiOptimizer":
            return made(optimizers.OptimizerMap(momentum(optimizers)))
        return made(0.05)

    model = build(kit, make_optimizer=make)
    optimizer = model.optimizer
    recorder, *_ = fit(kit, model)
    assert int(kit.array(optimizer.iterations)) == 9
    moved = zip(recorder.weights[1], recorder.weights[2], strict=True)
    assert any((a != b).any() for a, b in moved)
    # One snapshot: its average is itself, bit by bit.
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(optimizer), recorder.states[2])


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_external_scheduler_changes_nothing_and_its_rate_is_kept(kit, order):
    model = build(kit, make_optimizer=momentum)
    scheduler = kit.keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 * (epoch + 1))
    callbacks = ([scheduler], []) if order == "before" else ([], [scheduler])
    recorder, _, history = fit(kit, model, callbacks)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[2])
    # The pass ends itself, before any callback is told of its last batch.
    assert recorder.batch_rates[3] == [0.0, 0.0, pytest.approx(0.04)]
    assert kit.rate(model) == pytest.approx(0.04)
    np.testing.assert_allclose(history["learning_rate"][:3], [0.01, 0.02, 0.03], rtol=1e-6)


def test_a_learning_rate_schedule_is_zero_in_effect(kit):
    def scheduled(optimizers):
        schedule = optimizers.schedules.ExponentialDecay(0.05, 3, 0.5)
        return optimizers.SGD(schedule, momentum=0.9)

    model = build(kit, make_optimizer=scheduled)
    recorder, _, history = fit(kit, model)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[2])
    assert history["learning_rate"][3] == 0.0
    assert history["learning_rate"][2] > 0


def test_use_ema_does_not_overwrite_the_average(kit):
    model = build(kit, make_optimizer=lambda optimizers: optimizers.SGD(0.05, use_ema=True))
    recorder, *_ = fit(kit, model)
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
    x, y = data()
    fed = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model.fit(fed, epochs=4, verbose=0, shuffle=False, callbacks=[kit.SWA(2)])
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
    fit(kit, model, [taken])
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
    fit(kit, model, [note], epochs=4)
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
    fed = {"x": batched(*data()), "shuffle": False}
    model, plain = counting(kit, two_replicas)
    model.fit(**fed, verbose=0)
    model, averaged = counting(kit, two_replicas)
    fit(kit, model, **fed)
    assert averaged.traces == plain.traces + 2  # one trace, a call for each replica
    fit(kit, model, **fed)
    assert averaged.traces == plain.traces + 4
    model.fit(**fed, verbose=0)
    assert averaged.traces == plain.traces + 4


def test_validation_and_checkpoints_of_the_last_epoch_are_of_the_final_model(
    kit, two_replicas, tmp_path
):
    model = build(kit, two_replicas)
    path = str(tmp_path / "model.keras")
    checkpoint = kit.keras.callbacks.ModelCheckpoint(path)
    held_out = batched(*data())
    *_, history = fit(kit, model, ([], [checkpoint]), validation_data=held_out, validation_freq=[4])
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
    fit(kit, model, ([], [keep]))
    assert all(a is b for a, b in zip(functions(model), before[2], strict=True))
    assert all(a is b for a, b in zip(functions(model), before[3], strict=True))


class AccidentError(Exception):
    pass


HOOKS = ["on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_test_begin",
         "on_test_batch_end", "on_epoch_end"]  # fmt: skip


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_after_an_exception_in_a_callback_the_next_fit_trains(kit, hook, order):
    error = AccidentError if order == "before" else KeyboardInterrupt
    model = build(kit)
    epoch = []

    class Clock(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            epoch.append(number)

    class Failing(kit.keras.callbacks.Callback):
        pass

    def fail(self, *args, **kwargs):
        if epoch[-1] == 3:
            raise error

    setattr(Failing, hook, fail)
    callbacks = ([Clock(), Failing()], []) if order == "before" else ([Clock()], [Failing()])
    with pytest.raises(error):
        fit(kit, model, callbacks, validation_data=data(), validation_freq=[4])
    assert_trains_as_it_should(kit, model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["data", "step", "interrupted step"])
def test_after_an_exception_in_the_step_everything_is_restored_at_once(kit, two_replicas, where):
    x, y = data()
    with two_replicas.scope():
        fragile, healthy = kit.fragile()
        bn = kit.keras.layers.BatchNormalization()
        layers = [bn, kit.keras.layers.Dense(4), fragile, kit.keras.layers.Dense(1)]
        model = kit.keras.Sequential([kit.keras.layers.Input((3,)), *layers])
        model.compile(kit.keras.optimizers.SGD(0.05), "mse", jit_compile=False)

    def batches():
        for epoch in itertools.count():
            for i in range(0, 24, 8):
                if where == "data" and epoch == 3 and i == 16:
                    raise AccidentError("the data")
                yield x[i : i + 8].copy(), y[i : i + 8].copy()

    fed = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))
    )
    seen = {}

    class Breaking(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            if self.epoch == 3 and batch == 0:
                seen["function"] = self.model.train_function
                seen["statistics"] = kit.statistics(bn)
            if self.epoch == 3 and batch == 1:
                if where == "step":
                    healthy.assign(False)
                if where == "interrupted step":
                    self.model.train_function._function = interrupt

    def interrupt(iterator):
        raise KeyboardInterrupt

    expected = KeyboardInterrupt if where == "interrupted step" else tf.errors.OpError
    with pytest.raises(expected):
        model.fit(
            fed, steps_per_epoch=3, epochs=4, verbose=0, shuffle=False,
            callbacks=[kit.SWA(3), Breaking()],
        )  # fmt: skip
    assert kit.rate(model) == pytest.approx(0.05)
    assert model.train_function is not seen["function"]
    assert "make_train_function" not in vars(model)
    assert_bitwise(kit.statistics(bn), seen["statistics"])
    healthy.assign(True)
    assert_trains_as_it_should(kit, model)


def assert_trains_as_it_should(kit, model):
    """The next fit does what it does with a new model of the same weights."""
    with model.distribute_strategy.scope():
        twin = kit.keras.models.clone_model(model)
        twin.set_weights(model.get_weights())
        twin.compile(kit.keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    rates = []
    for trained in (model, twin):
        rate = kit.keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs, trained=trained: rates.append(kit.rate(trained))
        )
        trained.fit(batched(*data()), shuffle=False, verbose=0, callbacks=[rate])
    assert rates[0] == rates[1] == pytest.approx(0.05)
    assert kit.rate(model) == pytest.approx(0.05)
    assert_weights(model.get_weights(), twin.get_weights())


def test_after_an_exception_a_recompiled_model_keeps_its_new_optimizer(kit):
    model = build(kit)
    epochs = []

    class Failing(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            epochs.append(epoch)

        def on_train_batch_begin(self, batch, logs=None):
            if epochs[-1] == 3:
                raise AccidentError

    with pytest.raises(AccidentError):
        fit(kit, model, ([], [Failing()]))
    model.compile(kit.keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    before = kit.trainable(model)
    model.fit(*data(), batch_size=8, verbose=0)
    assert kit.rate(model) == pytest.approx(0.5)
    assert any((a != b).any() for a, b in zip(before, kit.trainable(model), strict=True))


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

    recorder, *_ = fit(kit, model, [Keep()])
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_bitwise(kit.optimizer_state(adam), states[2])
    assert int(kit.array(adam.iterations)) == 9


def tapped(kit, strategy, layers, shape, compile_arguments=None, last=None):
    """Fit a model; return the layers and all positions that reached each tap in the last epoch."""
    with strategy.scope():
        inputs = kit.keras.layers.Input(shape)
        x = inputs
        for layer in layers:
            x = layer(x)
        x = kit.keras.layers.Dense(1)(kit.keras.layers.Flatten()(x))
        model = kit.keras.Model(inputs, x)
        model.compile("sgd", "mse", **{"jit_compile": False, **(compile_arguments or {})})
    taps = [layer for layer in layers if isinstance(layer, kit.Tap)]
    watch = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: [setattr(t, "on", epoch == 3) for t in taps]
    )
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(20, *shape)) * 2 + 3).astype("float32")
    y = rng.normal(size=(20, 1)).astype("float32")
    fit(kit, model, [watch], x=x, y=y, batch_size=8)
    return model


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3,), -1), ((5, 3), -1), ((5, 4), 1), ((4, 5, 3), -1), ((4, 5, 3), 1), ((2, 4, 5, 3), -1)],
)
def test_inputs_of_any_rank_and_axis(kit, shape, axis):
    # tf_keras's fused kernel has no channels_first on CPU.
    arguments = {"fused": False} if kit.name == "tf_keras" and axis == 1 else {}
    tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization(axis=axis, **arguments)
    tapped(kit, NO_STRATEGY, [tap, norm], shape)
    assert_statistics(kit, norm, tap.positions(axis))


def test_synchronized_layers(kit, two_replicas):
    with two_replicas.scope():
        tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization(synchronized=True)
    tapped(kit, two_replicas, [tap, norm], (4, 3))
    assert_statistics(kit, norm, tap.positions())
    kit.assert_replicas_agree(norm)


@with_renorm
def test_renorm_layers_normalize_plainly_and_keep_all_statistics_in_agreement(kit):
    norm = kit.keras.layers.BatchNormalization(renorm=True, renorm_clipping={"rmax": 3.0})
    first, second = kit.Tap(), kit.Tap()
    tapped(kit, NO_STRATEGY, [first, norm, second], (3,))
    seen = first.positions()
    assert_statistics(kit, norm, seen)
    np.testing.assert_allclose(kit.array(norm.renorm_mean), seen.mean(0), rtol=1e-6)
    stddev = np.sqrt(seen.var(0) + norm.epsilon)
    np.testing.assert_allclose(kit.array(norm.renorm_stddev), stddev, rtol=1e-6)
    np.testing.assert_allclose(kit.array(norm.moving_stddev), stddev, rtol=1e-6)
    gamma, beta = kit.array(norm.gamma), kit.array(norm.beta)
    for x, y in zip(first.seen, second.seen, strict=True):
        plain = gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon) + beta
        np.testing.assert_allclose(y, plain, atol=1e-5)
    assert norm.renorm


def test_nested_wrapped_and_shared_layers(kit, two_replicas):
    layers = kit.keras.layers
    with two_replicas.scope():
        taps = [kit.Tap() for _ in range(3)]
        nested, wrapped, shared = (layers.BatchNormalization() for _ in range(3))
        inner = kit.keras.Sequential([kit.keras.Sequential([taps[0], nested])])
        time = layers.TimeDistributed(wrapped)
        stack = [inner, taps[1], time, taps[2], shared, taps[2], shared]
    tapped(kit, two_replicas, stack, (4, 3))
    taps[0].on = True
    for tap, norm in zip(taps[1:], (wrapped, shared), strict=True):
        assert_statistics(kit, norm, tap.positions())
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(20, 4, 3)) * 2 + 3).astype("float32")
    assert_statistics(kit, nested, positions(x))


def test_masked_steps_are_not_counted(kit):
    layers = kit.keras.layers
    norm = layers.BatchNormalization()
    inputs = layers.Input((4, 3))
    x = layers.LSTM(2)(norm(layers.Masking()(inputs)))
    model = kit.keras.Model(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    fed = (rng.normal(size=(24, 4, 3)) + 5).astype("float32")
    fed[::3, 2:] = 0
    fit(kit, model, x=fed, y=rng.normal(size=(24, 1)), batch_size=8)
    assert_statistics(kit, norm, positions(fed[(fed != 0).any(-1)]))


# Keras 3.15 itself overflows when it adds up several replicas' scaled float16 gradients.
@pytest.mark.parametrize(("policy", "n"), [("mixed_float16", 1), ("mixed_bfloat16", 2)])
def test_mixed_precision(kit, policy, n):
    strategy = mirrored(n)
    kit.keras.mixed_precision.set_global_policy(policy)
    try:
        with strategy.scope():
            tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization()
            stack = [kit.keras.layers.Dense(4), tap, norm]
        tapped(kit, strategy, stack, (3,))
    finally:
        kit.keras.mixed_precision.set_global_policy("float32")
    assert_statistics(kit, norm, tap.positions())
    kit.assert_replicas_agree(norm)


def test_layers_that_do_not_train_keep_what_they_have(kit):
    keras = kit.keras

    class Mixed(keras.Model):
        def __init__(self):
            super().__init__()
            make = keras.layers.BatchNormalization
            self.frozen, self.inference, self.live = (make() for _ in range(3))
            self.unused = make(center=False, scale=False)
            self.frozen.trainable = False
            self.dense = keras.layers.Dense(1)

        def call(self, inputs, training=None):
            x = self.inference(self.frozen(inputs, training=training), training=False)
            return self.dense(self.live(x, training=training))

    model = Mixed()
    model.unused.build((None, 3))
    model(data()[0])
    model.compile("sgd", "mse", jit_compile=False)
    kept = (model.frozen, model.inference, model.unused)
    for i, layer in enumerate(kept):
        layer.moving_mean.assign([i, 2.0, 3.0])
        layer.moving_variance.assign([4.0, i + 1, 6.0])
    before = [kit.statistics(layer) for layer in kept]
    fit(kit, model)
    for layer, statistics in zip(kept, before, strict=True):
        assert_bitwise(kit.statistics(layer), statistics)
    x = positions(data()[0])
    for layer in kept[:2]:
        mean, variance = (s.astype("float64") for s in kit.statistics(layer))
        x = (x - mean) / np.sqrt(variance + layer.epsilon)
        x = x * kit.array(layer.gamma) + kit.array(layer.beta)
    mean, variance = kit.statistics(model.live)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-5)


def subclasses(base):
    class Keywords(base):
        def call(self, x, **kwargs):
            return super().call(x, **kwargs)

    class AlwaysTrains(base):
        def call(self, inputs):
            return super().call(inputs, training=True)

    class Doubles(base):
        def call(self, inputs, training=None, mask=None):
            return super().call(2 * inputs, training=training)

    class NeverTrains(base):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=False)

    return Keywords, AlwaysTrains, Doubles, NeverTrains


def test_what_counts_in_a_subclass_is_what_it_hands_to_its_ancestor(kit):
    layers = [cls() for cls in subclasses(kit.keras.layers.BatchNormalization)]
    inputs = kit.keras.layers.Input((3,))
    joined = kit.keras.layers.Add()([layer(inputs) for layer in layers])
    model = kit.keras.Model(inputs, kit.keras.layers.Dense(1)(joined))
    model.compile(kit.keras.optimizers.SGD(1e-6), "mse", jit_compile=False)
    keywords, always, doubles, never = layers
    never.moving_mean.assign([7.0, 8.0, 9.0])
    fit(kit, model)
    x = positions(data()[0])
    # Keras 3 itself passes no `training` to a layer that does not name it.
    if kit.name == "tf_keras":
        assert_statistics(kit, keywords, x)
    for layer, seen in ((always, x), (doubles, 2 * x)):
        assert_statistics(kit, layer, seen)
    assert_bitwise([kit.array(never.moving_mean)], [[7, 8, 9]])
    assert "call" not in vars(keywords)


def test_a_callback_that_restores_weights_before_swa_changes_nothing(kit):
    model = build(kit)
    stopping = kit.keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
    recorder, *_ = fit(kit, model, [stopping])
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_statistics(kit, model.layers[0], positions(data()[0]))


def test_training_inside_the_pass_ends_it_with_a_warning(kit):
    model = build(kit)

    class Nested(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                self.model.train_on_batch(*data())

    with pytest.warns(UserWarning, match="statistics were not recomputed"):
        fit(kit, model, ([], [Nested()]))
    assert kit.rate(model) == pytest.approx(0.05)


@pytest.mark.parametrize("how", ["run_eagerly", "jit_compile", "steps_per_execution"])
def test_other_ways_to_run_the_step(kit, how):
    model = build(kit, **{how: 2 if how == "steps_per_execution" else True})
    recorder, swa, history = fit(kit, model)
    assert_bitwise(kit.trainable(model), recorder.weights[2])
    assert_statistics(kit, model.layers[0], positions(data()[0]))
    assert swa.inferred_batch_size == 8
    assert history["learning_rate"][3] == 0.0


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3, after epoch 1
def test_static_batches_are_not_counted_twice_at_the_end_of_the_data(kit, two_replicas):
    model = build(kit, two_replicas)
    x, _ = data()
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8, drop_remainder=True)
    fed = fed.filter(lambda x, y: True)  # of unknown length: its end is found by running into it
    fit(kit, model, x=fed, shuffle=False)
    assert_statistics(kit, model.layers[0], positions(x))
