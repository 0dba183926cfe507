"""Other callbacks, before and after SWA in the list: both do what they promise."""

import csv
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_statistics, assert_weights
from tests.helpers.data import batched, data, positions
from tests.helpers.fits import fit
from tests.helpers.interruptions import KilledError
from tests.helpers.kit import KITS
from tests.helpers.models import RATE, build

pytestmark = pytest.mark.either_keras

EPOCHS, STEPS = 5, 3

# The checkpoints that Keras writes of one epoch: the whole model, and the weights alone.
FORMATS = ["model.keras", "only.weights.h5"]


ORDERS = ["before", "after"]  # where in the list the other callback stands, as seen from SWA


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


# For callbacks that are the same code in Keras 3 and tf_keras.
one_order_each = pytest.mark.parametrize(
    ("order", "kit"), [*zip(ORDERS, KITS, strict=True)], indirect=["kit"]
)


def among(kit, model, others=(), order="before", alone=False, schedule="manual", **arguments):
    """Train among others, on one side of SWA; without SWA if they are to be alone."""
    arguments = {"epochs": EPOCHS, **arguments}
    if alone:
        recorder = kit.Recorder()
        callbacks = [*others, recorder] if order == "before" else [recorder, *others]
        history = model.fit(
            *data(), batch_size=8, verbose=0, shuffle=False, callbacks=callbacks, **arguments
        ).history
        return recorder, history
    swa = kit.SWA(arguments.pop("start_epoch", 2), schedule)
    recorder, _, history = fit(kit, model, swa=swa, **{order: others}, **arguments)
    return recorder, history


def assert_average(kit, model, recorder, epochs=(2, 3, 4)):
    assert_weights(kit.trainable(model), recorder.mean(*epochs))
    assert_statistics(kit, model.layers[0], positions(data()[0]))
    kit.assert_replicas_agree(model)


def load(kit, path, model):
    """The model in a file, or one like `model` with the weights in it."""
    if path.suffix != ".h5":
        return kit.keras.models.load_model(path)
    loaded = kit.keras.models.clone_model(model)
    loaded.load_weights(path)
    return loaded


@one_order_each
def test_learning_rate_scheduler(kit, order):
    model = build(kit)
    scheduled = [0.05, 0.04, 0.03, 0.02, 0.01]
    scheduler = kit.keras.callbacks.LearningRateScheduler(lambda epoch: scheduled[epoch])
    recorder, _ = among(kit, model, [scheduler], order)
    assert_average(kit, model, recorder)
    # The pass ends itself, before any callback is told of its last batch.
    last = [0.0] * (STEPS - 1) + scheduled[-1:]
    expected = [[rate] * STEPS for rate in scheduled[:-1]] + [last]
    np.testing.assert_allclose(recorder.batch_rates, expected, rtol=1e-6)
    assert kit.rate(model) == pytest.approx(scheduled[-1])


@one_order_each
def test_reduce_lr_on_plateau(kit, order):
    def reduce():  # at the end of every epoch but the first, which is the best so far
        return kit.keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=1e6)

    plain = build(kit)
    expected, _ = among(kit, plain, [reduce()], alone=True)
    model = build(kit)
    recorder, _ = among(kit, model, [reduce()], order)
    assert_average(kit, model, recorder)
    assert recorder.batch_rates[:-1] == expected.batch_rates[:-1]
    assert recorder.batch_rates[-2] == pytest.approx([RATE / 4] * STEPS)
    # The pass ends itself, before any callback is told of its last batch.
    assert recorder.batch_rates[-1] == [0.0] * (STEPS - 1) + [pytest.approx(RATE / 8)]
    assert kit.rate(model) == kit.rate(plain) == pytest.approx(RATE / 16)


def test_model_checkpoints(kit, order, tmp_path):
    def checkpoint(name, **arguments):
        return kit.keras.callbacks.ModelCheckpoint(str(tmp_path / name), **arguments)

    # tf_keras leaves something behind in a model that it saves as a SavedModel.
    formats = [*FORMATS, "saved"] if kit.name == "tf_keras" else FORMATS
    checkpoints = []
    for file in formats:
        only = {"save_weights_only": file == FORMATS[1]}
        checkpoints.append(checkpoint("{epoch}." + file, **only))
        checkpoints.append(checkpoint("{epoch}-{batch}." + file, save_freq=STEPS, **only))
    model = build(kit)
    recorder, _ = among(kit, model, checkpoints, order)
    assert_average(kit, model, recorder)

    epochs = range(1, EPOCHS + 1)
    names = {f"{e}{b}.{file}" for e in epochs for b in ("", f"-{STEPS}") for file in formats}
    assert {p.name for p in tmp_path.iterdir()} == names
    for file in formats:
        for epoch in epochs[-1:] if file == "saved" else epochs:
            saved = load(kit, tmp_path / f"{epoch}.{file}", model)
            assert_bitwise(kit.trainable(saved), recorder.weights[epoch - 1])
        by_batches = load(kit, tmp_path / f"{EPOCHS}-{STEPS}.{file}", model)
        assert_bitwise(kit.trainable(by_batches), kit.trainable(model))
        for last in [saved] + [by_batches] * (order == "after"):
            assert_bitwise(last.get_weights(), model.get_weights())
            if file != FORMATS[1]:
                assert kit.rate(last) == pytest.approx(RATE)


@one_order_each
def test_model_checkpoint_of_the_best_epochs(kit, order, tmp_path):
    model = build(kit)
    checkpoint = kit.keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}.keras"), monitor="val_loss", save_best_only=True
    )
    recorder, history = among(kit, model, [checkpoint], order, validation_data=batched(*data()))
    assert_average(kit, model, recorder)
    losses = history["val_loss"]
    best = [i + 1 for i, loss in enumerate(losses) if loss < min(losses[:i], default=np.inf)]
    assert {p.name for p in tmp_path.iterdir()} == {f"{epoch}.keras" for epoch in best}
    assert best[-1] == EPOCHS  # with statistics of all data it beats the moving ones
    assert losses[-1] == pytest.approx(model.evaluate(batched(*data()), verbose=0), rel=1e-6)
    for epoch in best:
        saved = load(kit, tmp_path / f"{epoch}.keras", model)
        assert_bitwise(kit.trainable(saved), recorder.weights[epoch - 1])
    assert_bitwise(saved.get_weights(), model.get_weights())


@one_order_each
def test_csv_logger(kit, order, tmp_path):
    model, path = build(kit), tmp_path / "log.csv"
    logger = kit.keras.callbacks.CSVLogger(str(path))
    recorder, history = among(kit, model, [logger], order, validation_data=batched(*data()))
    assert_average(kit, model, recorder)
    header, *lines = csv.reader(path.read_text().splitlines())
    logged = ["learning_rate"] * (order == "after") + ["loss", "val_loss"]
    assert header == ["epoch", *logged]
    columns = dict(zip(header, np.array(lines, float).T, strict=True))
    assert columns["epoch"].tolist() == list(range(EPOCHS))
    for name in logged:
        np.testing.assert_allclose(columns[name], history[name], rtol=1e-6)


def events(folder):
    """What was written: the steps and values of each scalar, and the number of graphs."""
    scalars, graphs = {}, 0
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            graphs += event.WhichOneof("what") == "graph_def"
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    scalars.setdefault(value.tag, {})[event.step] = number
    return scalars, graphs


@one_order_each
def test_tensorboard(kit, order, tmp_path):
    frequencies = ["batch", "epoch"]

    def boards(name):
        return [
            kit.keras.callbacks.TensorBoard(
                str(tmp_path / f"{name} {f}"),
                write_graph=True,
                update_freq=1 if f == "batch" else f,
            )
            for f in frequencies
        ]

    among(kit, build(kit), boards("plain"), alone=True)
    model = build(kit)
    recorder, history = among(kit, model, boards("averaged"), order)
    assert_average(kit, model, recorder)
    for f in frequencies:
        plain, plain_graphs = events(tmp_path / f"plain {f}")
        scalars, graphs = events(tmp_path / f"averaged {f}")
        assert graphs == plain_graphs
        scalars.pop("epoch_learning_rate", None)  # which tf_keras writes if SWA has logged it
        plain.pop("epoch_learning_rate", None)
        assert {t: [*of] for t, of in scalars.items()} == {t: [*of] for t, of in plain.items()}
        assert [*scalars["epoch_loss"]] == list(range(EPOCHS))
        np.testing.assert_allclose([*scalars["epoch_loss"].values()], history["loss"], rtol=1e-6)
        assert ("batch_loss" in scalars) == (f == "batch")


def test_backup_and_restore(kit, order, tmp_path):
    # Six epochs: three before averaging, two that are averaged, the BN pass.
    arguments = {"start_epoch": 4, "schedule": "constant", "epochs": 6}

    def interrupt(epoch, logs):
        if epoch == 3:
            raise KilledError

    def backup():
        return kit.keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    expected, _ = among(kit, build(kit), **arguments)
    interruption = kit.keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(KilledError):
        among(kit, build(kit), [backup(), interruption], order, **arguments)
    model = build(kit)  # as in a new process
    recorder, _ = among(kit, model, [backup()], order, **arguments)
    assert_average(kit, model, recorder, epochs=(1, 2))  # of the second fit: 4 and 5 of the run
    np.testing.assert_allclose(recorder.batch_rates, expected.batch_rates[3:], rtol=1e-6)
    for resumed, weights in zip(recorder.weights, expected.weights[3:], strict=True):
        assert_weights(resumed, weights)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_early_stopping_that_restores_weights(kit, order):
    model = build(kit)
    stopping = kit.keras.callbacks.EarlyStopping(
        "loss", patience=9, mode="max", restore_best_weights=True
    )
    recorder, history = among(kit, model, [stopping], order)
    assert len(history["loss"]) == EPOCHS
    if order == "before":
        assert_average(kit, model, recorder)
    else:
        best = int(np.argmax(history["loss"]))
        assert best < EPOCHS - 1
        assert_bitwise(kit.trainable(model), recorder.weights[best])
        assert kit.rate(model) == pytest.approx(RATE)


@pytest.mark.parametrize("kit", KITS[:1], ids=lambda kit: kit.name, indirect=True)
@pytest.mark.parametrize(("order", "swap_on_epoch"), [("before", False), ("after", True)])
def test_swap_ema_weights(kit, order, swap_on_epoch):
    def train(alone):
        optimizer = functools.partial(
            kit.keras.optimizers.SGD, RATE, momentum=0.9, use_ema=True, ema_momentum=0.5
        )
        model = build(kit, optimizer=optimizer)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch)
        return model, *among(kit, model, [swap], order, alone, validation_data=batched(*data()))

    _, plain_recorder, plain = train(alone=True)
    model, recorder, history = train(alone=False)
    assert_average(kit, model, recorder)
    for weights, expected in zip(recorder.weights[:-1], plain_recorder.weights[:-1], strict=True):
        assert_weights(weights, expected)
    np.testing.assert_allclose(history["val_loss"][:-1], plain["val_loss"][:-1], rtol=1e-6)
    assert kit.rate(model) == pytest.approx(RATE)


@pytest.mark.parametrize("frequency", [None, 2])
def test_an_optimizer_with_an_average_of_its_own(kit, two_replicas, frequency):
    arguments = {"optimizer": functools.partial(
        kit.keras.optimizers.SGD, RATE, momentum=0.9,
        use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=frequency,
    )}  # fmt: skip
    if not frequency:  # Keras 3.15.1 itself cannot overwrite weights under a strategy
        arguments["strategy"] = two_replicas
    expected, _ = among(kit, build(kit, **arguments), alone=True)
    model = build(kit, **arguments)
    recorder, _ = among(kit, model)
    assert_average(kit, model, recorder)
    for epoch in range(EPOCHS - 1):
        assert_bitwise(recorder.weights[epoch], expected.weights[epoch])
    assert_bitwise(recorder.states[-1], recorder.states[-2])


HOOKS = [
    "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_train_batch_begin",
    "on_train_batch_end", "on_test_begin", "on_test_end", "on_test_batch_begin",
    "on_test_batch_end",
]  # fmt: skip


@one_order_each
def test_callbacks_that_do_not_touch_the_model(kit, order):
    def train(alone):
        calls = []

        class Bystander(kit.keras.callbacks.Callback):
            pass

        def note(hook):
            def call(self, *args, **kwargs):
                *number, logs = *args, *kwargs.values()
                calls.append((hook, *number, sorted({*(logs or ())} - {"learning_rate"})))

            return call

        for hook in HOOKS:
            setattr(Bystander, hook, note(hook))
        numbers = []
        others = [
            Bystander(),
            kit.keras.callbacks.TerminateOnNaN(),
            kit.keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: numbers.append(epoch)
            ),
        ]
        model = build(kit)
        recorder, _ = among(kit, model, others, order, alone, validation_data=batched(*data()))
        assert numbers == list(range(EPOCHS))
        return model, recorder, calls

    *_, expected = train(alone=True)
    model, recorder, calls = train(alone=False)
    assert_average(kit, model, recorder)
    assert calls == expected
    assert not model.stop_training
