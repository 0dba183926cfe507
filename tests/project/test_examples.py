"""What the documents and docstrings show, run as it stands, and what they say twice."""

import doctest
import inspect
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import swa_dist
from tests.helpers.assertions import assert_mean, assert_variance, assert_weights
from tests.helpers.kit import KITS
from tests.helpers.processes import FOREVER, ROOT

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
@pytest.mark.parametrize(
    ("schedule", "kit"), [*zip(ARGUMENTS, KITS, strict=True)], indirect=["kit"]
)
def test_the_examples_of_keras_swa_run(kit, schedule, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)  # which `settings` hides
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


README, GUIDE = "README.md", "swa_dist/GUIDE.md"


@pytest.fixture
def blocks(pytestconfig):
    """Return the Python blocks of a document."""

    def of(document):
        text = (pytestconfig.rootpath / document).read_text()
        return re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    return of


CHECKS = {
    # After the README's first block, which runs again before the guide's.
    "swa = SWA(start_epoch=15, lr_schedule=": """
assert keras.Model.__module__.startswith("{package}.")
assert swa.n_averaged == 5
assert model.history.history["learning_rate"][-1] == 0
assert len(model.history.history["learning_rate"]) == 20
""",
    "CSVLogger": """
assert "learning_rate" in open("log.csv").readline()
""",
    "save_best_only": """
assert keras.models.load_model("best.keras").count_params() == model.count_params()
""",
    "averaged = keras.models.clone_model": """
means = [np.zeros(v.shape) for v in averaged.trainable_variables]
for name in names:
    other = keras.models.clone_model(model)
    other.load_weights(name)
    means = [m + np.float64(v.numpy()) / 3 for m, v in zip(means, other.trainable_variables)]
for mean, variable in zip(means, averaged.trainable_variables):
    np.testing.assert_allclose(variable.numpy(), mean, rtol=1e-5, atol=1e-7)
""",
    "def cook(soup)": """
np.testing.assert_allclose(cook(soup), best, rtol=1e-4)  # `data` is shuffled anew
assert best < 1.0001 * min(cook([name]) for name in names)
""",
    "class KeepRaw": """
assert any((w != v.numpy()).any() for w, v in zip(raw.weights, model.trainable_variables))
""",
    "untrained, folds": """
for model in models:
    last = model.history.history["val_loss"][-1]
    np.testing.assert_allclose(last, model.evaluate(test, verbose=0), rtol=1e-5)
""",
    "def rate(epoch)": """
np.testing.assert_allclose(model.history.history["learning_rate"][6:], [0.01446, *[0.01] * 3], 1e-3)
""",
    "def fit(self, hp": """
for epochs in (3, 4):
    fit(None, None, model, data, epochs=epochs, verbose=0)
    assert ("learning_rate" in model.history.history) == (epochs == 4)
""",
}


@pytest.mark.either_keras
def test_the_blocks_of_readme_and_guide_run_one_after_another(kit, blocks, pytestconfig, tmp_path):
    package = kit.keras.__name__
    first, *others = blocks(README)
    program = "import sklearn, tests.helpers\n"  # its settings
    for block in (first, *others, first, *blocks(GUIDE)):
        checks = [check for text, check in CHECKS.items() if text in block]
        program += block + "".join(checks).replace("{package}", package)
    assert all(text in program for text in CHECKS)
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:swa_dist", "-c", program],
        env={
            **os.environ,
            "TF_USE_LEGACY_KERAS": str(int(package == "tf_keras")),
            "PYTHONPATH": str(pytestconfig.rootpath),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=FOREVER,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "SWAWarning" not in result.stderr
    assert "Epoch 00020: running forward pass to adjust batch normalization" in result.stdout


def test_the_readmes_plan_is_what_it_prints(blocks, pytestconfig, capsys):
    example = next(b for b in blocks(README) if ".plan(" in b)
    exec(example, {"SWA": KITS[0].SWA})
    readme = (pytestconfig.rootpath / README).read_text()
    shown = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert shown in readme


def test_the_readme_shows_all_arguments_with_their_defaults(blocks):
    (example,) = (b for b in blocks(README) if "bn_steps" in b)
    shown = {}
    exec(example, {"SWA": shown.update})
    expected = inspect.signature(KITS[0].SWA).parameters
    assert [*shown] == [*expected]
    assert [*shown.values()][1:] == [p.default for p in expected.values()][1:]


def test_the_readmes_versions_are_those_of_the_test_command():
    command = (ROOT / "scripts" / "test").read_text()
    pins = re.findall(
        r'^    "([\d.]+) tensorflow==(\S+) keras==(\S+) tf_keras==(\S+)"$', command, re.MULTILINE
    )
    table = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|",
        (ROOT / README).read_text(),
        re.MULTILINE,
    )
    assert len(pins) == 5
    assert table == pins


def test_links_lead_somewhere(pytestconfig):
    documents = [README, GUIDE, "swa_dist/README.md", "scripts/results/README.md"]
    for document in [*documents, ".github/CONTRIBUTING.md", "CHANGELOG.md"]:
        path = pytestconfig.rootpath / document
        for file, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", path.read_text()):
            target = path.parent / file if file else path
            assert target.exists(), (document, file)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor in anchors, (document, anchor)


def test_the_readme_is_short_and_has_no_pictures(pytestconfig):
    readme = (pytestconfig.rootpath / README).read_text()
    assert len(readme.splitlines()) <= 200
    assert "![" not in readme  # the package index would not find them


class Shown(doctest.OutputChecker):
    """Compares the end of what an example prints, where it shows that: not progress bars."""

    def check_output(self, want, got, optionflags):
        return got.endswith(want)


@pytest.mark.either_keras
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # Keras 3's own
def test_the_examples_of_docstrings(kit, two_replicas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Strategies of several sizes in one process would abort each other.
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: two_replicas)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(8)

    def build_model():
        layers = kit.keras.layers
        return kit.keras.Sequential(
            [layers.Input((3,)), layers.BatchNormalization(), layers.Dense(1)]
        )

    with two_replicas.scope():
        model = build_model()
        model.compile("sgd", "mse")
    untrained = build_model()
    untrained.save_weights("averaged.weights.h5")

    def stop(epoch, logs):
        raise KeyboardInterrupt

    interrupted = kit.SWA(1)
    stopping = kit.keras.callbacks.LambdaCallback(on_epoch_end=stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(data, epochs=3, callbacks=[interrupted, stopping], verbose=0)
    public = {
        name: getattr(swa_dist, name)
        for name in swa_dist.__all__
        if name not in ("SWA", "SWAWarning", "__version__")
    }
    names = public | {"np": np, "tf": tf, "SWA": kit.SWA, "swa": interrupted, "model": model}
    names |= {"build_model": build_model, "strategy": two_replicas}
    names |= {"data": data, "test_data": data, "x_train": np.zeros((60_000, 3), "float32")}
    names |= {"train_step": lambda batch: None, "validate": lambda model: None}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(Shown())
    methods = {f"SWA.{name}": getattr(kit.SWA, name) for name in ("plan", "averaged_weights")}
    for name, described in {**public, "SWA": kit.SWA, **methods}.items():
        # tf_keras does not load weights into a model that was trained under a strategy.
        its_names = names | {"model": untrained} if name == "update_bn" else names
        (example,) = finder.find(described, name, module=False, globs=its_names)
        assert example.examples, name
        printed = []
        assert runner.run(example, out=printed.append).failed == 0, "".join(printed)


@pytest.mark.either_keras
def test_the_custom_training_loop(kit, blocks, two_replicas):
    (example,) = (b for b in blocks(GUIDE) if "GradientTape" in b)
    rng, layers = np.random.default_rng(0), kit.keras.layers
    x = rng.normal(size=(240, 3)).astype("float32") * 3 + 1
    with two_replicas.scope():
        model = kit.keras.Sequential(
            [layers.Input((3,)), layers.BatchNormalization(), layers.Dense(1)]
        )
        model.compile(kit.keras.optimizers.SGD(0.05))
        model.optimizer.build(model.trainable_variables)
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

    data = tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(8)
    distributed = two_replicas.experimental_distribute_dataset(data)
    names = {"tf": tf, "model": model, "strategy": Strategy, "data": data}
    exec(example, names)
    assert names["average"].n_averaged == len(snapshots) == 3
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*snapshots, strict=True)]
    assert_weights(kit.trainable(model), expected)
    mean, variance = kit.statistics(model.layers[0])
    assert_mean(mean, np.float64(x).mean(0), x.std(0))
    assert_variance(variance, np.float64(x).var(0))
    kit.assert_replicas_agree(model)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # Keras 3's own
def test_the_lines_that_resume_an_interrupted_run(kit, blocks, tmp_path, monkeypatch):
    """Ended by its data in epoch 17, and run again."""
    monkeypatch.chdir(tmp_path)
    (example,) = (b for b in blocks(README) if "BackupAndRestore" in b)
    assert len(example.splitlines()) == 2
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
        return names["swa"], model

    with pytest.raises(Exception, match="the machine goes away"):
        run(17)
    swa, model = run(None)
    assert swa.n_averaged == 5
    assert len(model.history.history["loss"]) == 20 - 16
    assert not list((tmp_path / "backup").glob("swa*"))


def test_the_schedules_are_drawn(pytestconfig, tmp_path):
    output = tmp_path / "drawn.png"
    script = pytestconfig.rootpath / "scripts" / "plot_schedules.py"
    command = [sys.executable, "-X", "importtime", str(script), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=FOREVER, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert "lr_schedule='cyclic'" in result.stdout
    assert "tensorflow" not in result.stderr
