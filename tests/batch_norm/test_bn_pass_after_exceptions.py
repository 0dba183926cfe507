"""After an exception in the BN pass everything is as it was."""

import functools
import itertools

import pytest
import tensorflow as tf

from tests.helpers.assertions import Statistics, assert_bitwise, assert_weights
from tests.helpers.callbacks import at
from tests.helpers.data import batched, data
from tests.helpers.devices import on
from tests.helpers.fits import ONE_SNAPSHOT, fit
from tests.helpers.models import RATE, build, norm_of

pytestmark = pytest.mark.either_keras


def without_momentum(kit):
    return build(kit, optimizer=functools.partial(kit.keras.optimizers.SGD, RATE))


class FailureError(Exception):
    pass


HOOKS = ["on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_test_begin",
         "on_test_batch_end", "on_epoch_end"]  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "order"), [*zip(HOOKS, itertools.cycle(["before", "after"]), strict=False)]
)
def test_after_an_exception_in_a_callback_the_next_fit_trains(kit, hook, order):
    error = FailureError if order == "before" else KeyboardInterrupt
    model = without_momentum(kit)
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
    before, after = [Clock()], [Failing()]
    if order == "before":
        before, after = [*before, *after], []
    with pytest.raises(error):
        fit(kit, model, before, after, validation_data=data(), validation_freq=[4], **ONE_SNAPSHOT)
    assert_trains_as_it_should(kit, model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["data", "step", "interrupted step"])
def test_after_an_exception_in_the_step_everything_is_restored_at_once(kit, where):
    x, y = data()
    with on(2 if where == "step" else 0).scope():
        fragile, healthy = kit.fragile()
        bn = kit.keras.layers.BatchNormalization()
        layers = [bn, kit.keras.layers.Dense(4), fragile, kit.keras.layers.Dense(1)]
        model = kit.keras.Sequential([kit.keras.layers.Input((3,)), *layers])
        model.compile(kit.keras.optimizers.SGD(0.05), "mse", jit_compile=False)

    def batches():
        for epoch in itertools.count():
            for i in range(0, 24, 8):
                if where == "data" and epoch == 3 and i == 16:
                    raise FailureError("the data")
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
    model = without_momentum(kit)
    epochs = []

    class Failing(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            epochs.append(epoch)

        def on_train_batch_begin(self, batch, logs=None):
            if epochs[-1] == 3:
                raise FailureError

    with pytest.raises(FailureError):
        fit(kit, model, after=[Failing()], **ONE_SNAPSHOT)
    model.compile(kit.keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    before = kit.trainable(model)
    model.fit(*data(), batch_size=8, verbose=0)
    assert kit.rate(model) == pytest.approx(0.5)
    assert any((a != b).any() for a, b in zip(before, kit.trainable(model), strict=True))


def fail(model):
    raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", ["constant", "cyclic"])
def test_after_a_pass_that_was_cut_short_a_schedule_starts_from_the_rate_as_it_was(kit, schedule):
    model = build(kit)
    with pytest.raises(KeyboardInterrupt):
        fit(kit, model, after=[at(kit, 4, fail, "on_train_batch_begin")], epochs=4)
    assert kit.rate(model) == 0
    swa = kit.SWA(4, schedule, swa_freq=1 + (schedule == "cyclic"))
    history = model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=[swa]).history
    assert history["learning_rate"][0] == pytest.approx(RATE)
    assert kit.rate(model) > 0


def test_what_breaks_the_pass_leaves_averaged_statistics(kit, two_replicas):
    model, kept = build(kit, two_replicas), Statistics(kit, 2, 3)

    def break_off(model):
        model.train_function._function = None

    broken = at(kit, 4, break_off, "on_train_batch_end")
    with pytest.raises(TypeError):
        fit(kit, model, before=[kept.callback], after=[broken], epochs=4)
    kept.assert_averaged(kit, model)
    assert norm_of(model) is not None
