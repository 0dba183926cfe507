"""What READMEs show, run as it stands."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests import FOREVER
from tests.tolerances import assert_mean, assert_variance, assert_weights

# The two examples of keras-swa's README, with only the imports brought up to date.
SEED_EXAMPLE = """
from sklearn.datasets import make_blobs
from {keras}.utils import to_categorical
from {keras}.models import Sequential
from {keras}.layers import Dense
from {keras}.optimizers import SGD

from {swa} import SWA

# make dataset
X, y = make_blobs(n_samples=1000,
                  centers=3,
                  n_features=2,
                  cluster_std=2,
                  random_state=2)

y = to_categorical(y)

# build model
model = Sequential()
model.add(Dense(50, input_dim=2, activation='relu'))
model.add(Dense(3, activation='softmax'))

model.compile(loss='categorical_crossentropy',
              optimizer=SGD(learning_rate=0.1))

epochs = 100
start_epoch = 75

# define swa callback
swa = SWA(start_epoch=start_epoch,
          {arguments}
          verbose=1)

# train
model.fit(X, y, epochs=epochs, verbose=1, callbacks=[swa])
"""

ARGUMENTS = {
    "constant": "lr_schedule='constant',\n          swa_lr=0.01,",
    "cyclic": "lr_schedule='cyclic',\n          swa_lr=0.001,\n          swa_lr2=0.003,\n"
    "          swa_freq=3,",
}


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`/`input_dim`")  # Keras 3's advice
@pytest.mark.parametrize("schedule", ["constant", "cyclic"])
def test_the_examples_of_keras_swa_run(kit, schedule, capsys):
    example = SEED_EXAMPLE.format(
        keras=kit.keras.__name__, swa=kit.SWA.__module__, arguments=ARGUMENTS[schedule]
    )
    names = {}
    exec(example, names)
    printed = capsys.readouterr().out
    lines = re.findall(r"^Epoch \d{5}: .*$", printed, re.MULTILINE)
    assert lines == [
        "Epoch 00075: starting stochastic weight averaging",
        "Epoch 00101: final model weights set to stochastic weight average",
    ]
    assert "Epoch 100/100" in printed
    # Epochs 75 to 100 are 26: each of them, or the ends of 8 cycles of 3.
    assert names["swa"].n_averaged == (26 if schedule == "constant" else 8)
    rates = names["model"].history.history["learning_rate"]
    assert rates[0] == pytest.approx(0.1)
    assert rates[73] == pytest.approx(names["swa"].options.swa_lr)
    if schedule == "cyclic":
        assert rates[74:78] == pytest.approx([0.007 / 3, 0.005 / 3, 0.001, 0.007 / 3])


@pytest.mark.parametrize("legacy", ["0", "1"])
def test_the_readmes_example_runs(legacy, pytestconfig):
    example = readme_blocks(pytestconfig.rootpath)[0]
    check = f"""
assert keras.Model.__module__.startswith({"keras." if legacy == "0" else "tf_keras."!r})
assert swa.n_averaged == 5
assert len(model.history.history["learning_rate"]) == 20
"""
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:swa_dist", "-c", example + check],
        env={**os.environ, "TF_USE_LEGACY_KERAS": legacy},
        capture_output=True,
        text=True,
        timeout=FOREVER,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Epoch 00020: running forward pass to adjust batch normalization" in result.stdout


def readme_blocks(root):
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


def test_the_readmes_plan_is_what_it_prints(kit, pytestconfig, capsys):
    example = next(b for b in readme_blocks(pytestconfig.rootpath) if ".plan(" in b)
    exec(example, {"SWA": kit.SWA})
    readme = (pytestconfig.rootpath / "README.md").read_text()
    shown = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert shown in readme


def test_the_loop_of_ones_own(kit, pytestconfig, two_replicas):
    (example,) = (b for b in readme_blocks(pytestconfig.rootpath) if "GradientTape" in b)
    rng, layers = np.random.default_rng(0), kit.keras.layers
    x = rng.normal(size=(240, 3)).astype("float32") * 3 + 1
    with two_replicas.scope():
        model = kit.keras.Sequential(
            [layers.Input((3,)), layers.BatchNormalization(), layers.Dense(1)]
        )
        optimizer = kit.keras.optimizers.SGD(0.05)
        optimizer.build(model.trainable_variables)
    snapshots = []

    class Data:
        """Notes the weights after every tenth batch, before the loop asks for the next."""

        def __iter__(self):
            for number, batch in enumerate(distributed):
                if number and number % 10 == 0:
                    snapshots.append(kit.trainable(model))
                yield batch
            snapshots.append(kit.trainable(model))

    class Strategy:
        run = staticmethod(two_replicas.run)
        experimental_distribute_dataset = staticmethod(lambda data: Data())

    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(8)
    distributed = two_replicas.experimental_distribute_dataset(data)
    names = {"model": model, "optimizer": optimizer, "strategy": Strategy, "data": data}
    exec(example, names)
    assert names["average"].n_averaged == len(snapshots) == 3
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*snapshots, strict=True)]
    assert_weights(kit.trainable(model), expected)
    mean, variance = kit.statistics(model.layers[0])
    assert_mean(mean, np.float64(x).mean(0), x.std(0))
    assert_variance(variance, np.float64(x).var(0))
    kit.assert_replicas_agree(model)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # Keras 3's own
def test_the_lines_that_resume_an_interrupted_run(kit, pytestconfig, tmp_path, monkeypatch):
    """Ended by its data in epoch 50, and run again."""
    monkeypatch.chdir(tmp_path)
    (example,) = (b for b in readme_blocks(pytestconfig.rootpath) if "BackupAndRestore" in b)
    assert len(example.splitlines()) == 5  # the model's line is not ours
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    epochs = itertools.count(1)

    def batches(end):
        if next(epochs) == end:
            raise RuntimeError("the machine goes away")
        yield from zip(x.reshape(2, 8, 3).copy(), x[:, :1].reshape(2, 8, 1).copy(), strict=True)

    def run(end):
        keras, layers = kit.keras, kit.keras.layers
        model = keras.Sequential([layers.Input((3,)), layers.BatchNormalization(), layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
        signature = (tf.TensorSpec((8, 3)), tf.TensorSpec((8, 1)))
        data = tf.data.Dataset.from_generator(lambda: batches(end), output_signature=signature)
        data = data.apply(tf.data.experimental.assert_cardinality(2))
        names = {"keras": keras, "SWA": kit.SWA, "model": model, "data": data}
        exec(example, names)
        return names["callbacks"][1], model

    with pytest.raises(Exception, match="the machine goes away"):
        run(50)
    swa, model = run(None)
    assert swa.n_averaged == 15
    assert len(model.history.history["loss"]) == 60 - 49
    assert not list((tmp_path / "backup").glob("swa*"))


def test_the_kaggle_kernel_runs_and_is_what_the_readme_shows(pytestconfig, tmp_path):
    kernel = (pytestconfig.rootpath / "scripts" / "kaggle_kernel.py").read_text()
    (shown,) = (b for b in readme_blocks(pytestconfig.rootpath) if "find_strategy" in b)
    assert shown in kernel
    shorter = kernel.replace("EPOCHS, START, BATCH = 20, 15, 16", "EPOCHS, START, BATCH = 3, 1, 16")
    assert shorter != kernel
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:swa_dist", "-c", shorter],
        cwd=tmp_path, capture_output=True, text=True, timeout=FOREVER, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "MirroredStrategy, 4 replicas, batches of 64" in result.stdout
    assert "The average of 2 epochs is right on" in result.stdout
    assert (tmp_path / "model.keras").is_file()


def test_the_schedules_are_drawn(pytestconfig, tmp_path):
    output = tmp_path / "drawn.png"
    script = pytestconfig.rootpath / "scripts" / "plot_schedules.py"
    command = [sys.executable, "-X", "importtime", str(script), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=FOREVER, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert "lr_schedule='cyclic'" in result.stdout
    assert "tensorflow" not in result.stderr
