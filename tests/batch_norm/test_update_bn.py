"""One pass over data gives the statistics of that data, whatever it is and however it is cut."""

import collections
import functools
import itertools
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import infer_batch_size, peekable, update_bn
from swa_dist.batch_norm import hooks
from swa_dist.batch_norm.statistics import BatchNormStatistics
from tests.helpers.assertions import assert_bitwise, assert_mean, assert_variance
from tests.helpers.data import positions
from tests.helpers.devices import devices, mirrored
from tests.helpers.kit import KITS
from tests.helpers.marks import takes_missing_inputs, with_renorm

pytestmark = pytest.mark.either_keras


NO_STRATEGY = tf.distribute.get_strategy()
RNG = np.random.default_rng(0)
X = (RNG.gamma(2, size=(38, 3)) * [1, 3, 5] + [2, -5, 30]).astype("float32")
Y = RNG.normal(size=(38, 1)).astype("float32")
WEIGHTS = np.linspace(0, 1, 38, dtype="float32")
BATCH = 8  # 8, 8, 8, 8, 6: over 4 replicas the last one is dealt out 2, 2, 2, 0


def build(kit, strategy=NO_STRATEGY, norms=2):
    with strategy.scope():
        model = kit.keras.Sequential([kit.keras.layers.Input((3,))])
        model.add(kit.keras.layers.BatchNormalization())
        model.add(kit.keras.layers.Dense(4, activation="tanh"))
        if norms > 1:
            model.add(kit.keras.layers.BatchNormalization())
        for weight in model.weights:
            weight.assign(1 + tf.random.stateless_uniform(weight.shape, (1, len(weight.name))))
    return model


def functional(kit, strategy, shape, *layers):
    """A model of layers, made by functions, and those layers."""
    with strategy.scope():
        layers = [make() for make in layers]
        inputs = outputs = kit.keras.layers.Input(shape)
        for layer in layers:
            outputs = layer(outputs)
        return kit.keras.Model(inputs, outputs), layers


def copies(kit, model):
    """Every weight as every replica has it."""
    return [copy for weight in model.weights for copy in kit.replicas(weight)]


def assert_statistics(kit, layer, seen):
    for mean in kit.replicas(layer.moving_mean):
        assert_mean(mean, seen.mean(0), seen.std(0))
    for variance in kit.replicas(layer.moving_variance):
        assert_variance(variance, seen.var(0))


def shift(kit, model):
    """Make the statistics wrong, on each replica by its own amount."""
    for layer in kit_layers(kit, model):
        for variable in (layer.moving_mean, layer.moving_variance):
            local = kit.tensor(variable)
            for i, copy in enumerate(getattr(local, "values", [local])):
                copy.assign(copy + i + 3)


def kit_layers(kit, model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, kit.keras.layers.BatchNormalization)
    ]


def batches(parts, endless=False):
    for _ in itertools.count() if endless else range(1):
        for i in range(0, len(X), BATCH):
            # A single part comes as itself, not as a tuple of one.
            batch = tuple(part[i : i + BATCH] for part in parts)
            yield batch if len(batch) > 1 else batch[0]


def dataset(parts):
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH)


def sequence(kit, parts):
    class Batches(kit.keras.utils.Sequence):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return next(itertools.islice(batches(parts), i, None))

    return Batches()


def of_generator(parts):
    spec = tuple(tf.TensorSpec([None, *part.shape[1:]]) for part in parts)
    spec = spec if len(spec) > 1 else spec[0]
    return tf.data.Dataset.from_generator(lambda: batches(parts), output_signature=spec)


def of_function(strategy, parts):
    # Each replica takes one after the other.
    return strategy.distribute_datasets_from_function(
        lambda context: tf.data.Dataset.from_tensor_slices(parts).batch(
            context.get_per_replica_batch_size(BATCH)
        )
    )


FEEDS = {
    "arrays": lambda kit, strategy, parts: (parts, {"batch_size": BATCH}),
    "dataset": lambda kit, strategy, parts: (dataset(parts), {}),
    "mapped dataset": lambda kit, strategy, parts: (
        dataset(parts).map(lambda *p: list(p)),  # which `tf.data` makes a tuple
        {},
    ),
    "endless dataset": lambda kit, strategy, parts: (dataset(parts).repeat(), {"steps": 5}),
    "dataset of a generator": lambda kit, strategy, parts: (of_generator(parts), {}),
    "distributed dataset": lambda kit, strategy, parts: (
        strategy.experimental_distribute_dataset(dataset(parts)),
        {},
    ),
    "distributed function": lambda kit, strategy, parts: (of_function(strategy, parts), {}),
    "sequence": lambda kit, strategy, parts: (sequence(kit, parts), {}),
    "generator": lambda kit, strategy, parts: (batches(parts), {}),
    "endless generator": lambda kit, strategy, parts: (batches(parts, True), {"steps": 5}),
    "peekable": lambda kit, strategy, parts: (peekable(batches(parts)), {}),
    "deque": lambda kit, strategy, parts: (collections.deque(batches(parts)), {}),
    "iterator": lambda kit, strategy, parts: (iter(dataset(parts)), {}),
    "distributed iterator": lambda kit, strategy, parts: (
        iter(strategy.experimental_distribute_dataset(dataset(parts))),
        {"steps": 5},
    ),
}


@pytest.mark.parametrize(
    ("feed", "kit"), [*zip(FEEDS, itertools.cycle(KITS), strict=False)], indirect=["kit"]
)
def test_any_kind_of_data_with_and_without_targets(kit, feed):
    for n, parts in ((1, (X,)), (2, (X, Y, WEIGHTS))):
        strategy = mirrored(n)
        model = build(kit, strategy, norms=1)
        shift(kit, model)
        data, arguments = FEEDS[feed](kit, strategy, parts)
        assert infer_batch_size(data, arguments.get("batch_size")) in (BATCH, 32, None)
        assert update_bn(model, data, **arguments) == 38
        assert_statistics(kit, model.layers[0], positions(X))
        kit.assert_replicas_agree(model)


@pytest.mark.exactness
@pytest.mark.optimized_graphs
def test_one_answer_however_the_data_is_cut(kit, strategy):
    model = build(kit, strategy, norms=1)
    for size in (1, 2, 7, 32, 38):
        shift(kit, model)
        assert update_bn(model, X, batch_size=size) == 38
        assert_statistics(kit, model.layers[0], positions(X))
        kit.assert_replicas_agree(model)


def test_replicas_and_batches_without_samples(kit, four_replicas):
    model = build(kit, four_replicas, norms=1)
    fed = np.split(X, np.cumsum([0, 1, 0, 5, 3]))
    assert update_bn(model, iter(fed)) == 38
    assert_statistics(kit, model.layers[0], positions(X))
    kit.assert_replicas_agree(model)
    assert all(np.isfinite(copy).all() for copy in copies(kit, model))


@pytest.mark.exactness
@pytest.mark.optimized_graphs
def test_it_is_the_callbacks_pass(kit, two_replicas):
    model = build(kit, two_replicas)
    model.compile("sgd", "mse", jit_compile=False)
    targets = np.repeat(Y, 4, 1)
    model.fit(
        X, targets, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=[kit.SWA(2)]
    )
    expected = copies(kit, model)
    shift(kit, model)
    assert update_bn(model, (X, targets), batch_size=BATCH) == 38
    assert_bitwise(copies(kit, model), expected)


def test_all_but_the_statistics_stays(kit, two_replicas):
    model = build(kit, two_replicas)
    with two_replicas.scope():
        model.compile(kit.keras.optimizers.Adam(0.1), "mse", metrics=["mae"], jit_compile=False)
    model.fit(X, np.repeat(Y, 4, 1), batch_size=BATCH, verbose=0)
    function = model.train_function

    def state():
        metrics = [copy for metric in model.metrics for v in metric.variables
                   for copy in kit.replicas(v)]  # fmt: skip
        weights = [copy for weight in model.trainable_variables for copy in kit.replicas(weight)]
        return [*weights, *kit.optimizer_state(model.optimizer), *metrics]

    before = state()
    update_bn(model, X)
    assert_bitwise(state(), before)
    assert model.train_function is function


def test_layers_that_do_not_train_keep_what_they_have(kit, two_replicas):
    make = kit.keras.layers.BatchNormalization
    inner, (_, nested) = functional(kit, two_replicas, (3,), kit.keras.layers.ReLU, make)
    model, (frozen, _, live) = functional(kit, two_replicas, (3,), make, lambda: inner, make)
    frozen.trainable = False
    frozen.moving_mean.assign([5.0, 0.0, 30.0])
    frozen.moving_variance.assign([1.0, 2.0, 3.0])
    before = [copy for v in frozen.weights for copy in kit.replicas(v)]
    mean, variance = (s.astype("float64") for s in kit.statistics(frozen))
    update_bn(model, X, batch_size=38)
    assert_bitwise([copy for v in frozen.weights for copy in kit.replicas(v)], before)
    seen = np.maximum((positions(X) - mean) / np.sqrt(variance + frozen.epsilon), 0)
    for actual, expected in zip(kit.statistics(nested), (seen.mean(0), seen.var(0)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert not np.array_equal(kit.array(live.moving_mean), kit.array(frozen.moving_mean))


def test_without_trainable_layers_the_data_is_not_read(kit):
    model = build(kit)
    model.trainable = False
    assert update_bn(model, iter(lambda: pytest.fail("touched"), None)) == 0


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_several_inputs(kit, two_replicas, structure):
    keras = kit.keras
    with two_replicas.scope():
        first, second = keras.layers.Input((3,), name="b"), keras.layers.Input((1,), name="a")
        norms = [keras.layers.BatchNormalization() for _ in range(2)]
        outputs = keras.layers.Concatenate()([norms[0](first), norms[1](second)])
        inputs = [first, second] if structure == "list" else {"b": first, "a": second}
        model = keras.Model(inputs, outputs)

    def fed(x, y):
        return [x, y] if structure == "list" else {"b": x, "a": y}

    parts = [(fed(X[i : i + BATCH], Y[i : i + BATCH]),) for i in range(0, 38, BATCH)]
    for data in (fed(X, Y), iter(parts)):
        shift(kit, model)
        assert update_bn(model, data) == 38
        for norm, seen in zip(norms, (X, Y), strict=True):
            assert_statistics(kit, norm, positions(seen))


class Loader:
    """Stands in for a `DataLoader` of PyTorch, with tensors on a GPU."""

    class Tensor:
        def __init__(self, array):
            self._array, self.shape, self.dtype = array, array.shape, array.dtype

        def cpu(self):
            return self._array

    def __init__(self, batches):
        self.dataset, self.batch_size = range(38), 20
        self._batches = [tf.nest.map_structure(self.Tensor, batch) for batch in batches]

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return iter(self._batches)


Loader.__name__, Loader.__module__ = "DataLoader", "torch.utils.data.dataloader"


def items(kit, batches):
    class Items(kit.keras.utils.Sequence):
        def __len__(self):
            return len(batches)

        def __getitem__(self, i):
            return batches[i]

    return Items()


KINDS = {
    "sequence": items,
    "generator": lambda kit, batches: (batch for batch in batches),
    "loader": lambda kit, batches: Loader(batches),
}

# What the inputs are made of, and what the batch is.
BATCHES_OF = {
    "(x, y)": (lambda x, z: x, lambda x, y, w: (x, y)),
    "[x]": (lambda x, z: x, lambda x, y, w: [x]),
    "[x, y]": (lambda x, z: x, lambda x, y, w: [x, y]),
    "[x, y, w]": (lambda x, z: x, lambda x, y, w: [x, y, w]),
    "[(x, z), y]": (lambda x, z: (x, z), lambda x, y, w: [x, y]),
    "([x, z], y)": (lambda x, z: [x, z], lambda x, y, w: (x, y)),
    "[{x, z}, y]": (lambda x, z: {"x": x, "z": z}, lambda x, y, w: [x, y]),
}


def fit_refuses(kit, kind, batch):
    # Seen with Keras 3.15.1 and tf_keras 2.21. `update_bn` has no reason to.
    if kit.name == "tf_keras":
        return kind == "loader"
    return batch == "([x, z], y)" or (kind == "generator" and batch.startswith("["))


@pytest.mark.parametrize(
    ("kind", "batch"),
    [*(("generator", batch) for batch in BATCHES_OF), ("sequence", "[x, y]"), ("loader", "[x, y]")],
)
def test_a_batch_is_what_it_is_to_fit(kit, kind, batch, monkeypatch):
    torch = types.ModuleType("torch")
    torch.utils = types.SimpleNamespace(data=types.SimpleNamespace(DataLoader=Loader))
    monkeypatch.setitem(sys.modules, "torch", torch)  # where Keras 3 looks for a loader's class

    structure, make = BATCHES_OF[batch]
    layers = kit.keras.layers
    nodes = structure(layers.Input((3,), name="x"), layers.Input((2,), name="z"))
    seen = tf.nest.flatten(structure(X, X[:, 1:]))
    taps, norms = [kit.Tap() for _ in seen], [layers.BatchNormalization() for _ in seen]
    parts = zip(norms, taps, tf.nest.flatten(nodes), strict=True)
    outputs = layers.Concatenate()([norm(tap(node)) for norm, tap, node in parts])
    # A loss that needs no targets.
    model = kit.keras.Model(nodes, layers.Dense(1, activity_regularizer="l2")(outputs))

    def data():
        cuts = [slice(0, 20), slice(20, 38)]
        parts = [(structure(X[i], X[i, 1:]), Y[i], WEIGHTS[i]) for i in cuts]
        return KINDS[kind](kit, [make(*part) for part in parts])

    def record(run):
        for tap in taps:
            tap.on, tap.seen = True, []
        run()
        return [np.concatenate(tap.seen) for tap in taps]

    shift(kit, model)
    assert_bitwise(record(lambda: update_bn(model, data())), seen)
    for norm, inputs in zip(norms, seen, strict=True):
        assert_statistics(kit, norm, positions(inputs))
    if not fit_refuses(kit, kind, batch):
        model.compile("sgd", run_eagerly=True)
        fit = functools.partial(model.fit, shuffle=False, steps_per_epoch=2, verbose=0)
        assert_bitwise(record(lambda: fit(data())), seen)


@pytest.mark.parametrize(
    "batch",
    [(), [], (X, Y, WEIGHTS, X), [X, Y, WEIGHTS, X]],
    ids=["()", "[]", "(x, y, w, x)", "[x, y, w, x]"],
)
def test_a_batch_of_another_length_is_refused_and_changes_nothing(kit, batch):
    model = build(kit)
    shift(kit, model)
    before = copies(kit, model)
    kind = type(batch).__name__
    with pytest.raises(ValueError, match=f"A {kind} of data must be .* a {kind} of {len(batch)}"):
        update_bn(model, iter([X, batch]))
    assert_bitwise(copies(kit, model), before)


@takes_missing_inputs
def test_an_optional_input_may_be_missing(kit, two_replicas):
    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = kit.keras.layers.BatchNormalization()

        def call(self, inputs, training=None):
            x, z = inputs
            return self.norm(x if z is None else 1 / z, training=training)

    with two_replicas.scope():
        model = Model()
        model((X, None))
    pairs = tf.data.Dataset.from_tensors(((X, None), Y))
    for data in (([X, None], Y), iter([[(X, None), Y]]), pairs):
        shift(kit, model)
        assert update_bn(model, data) == 38
        assert_statistics(kit, model.norm, positions(X))


class Series:
    """What is asked of a pandas Series, which Keras feeds to a model as a column."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def to_frame(self):
        return self.values[:, None]


def test_a_pandas_series_is_a_column(kit, two_replicas):
    layers = kit.keras.layers
    with two_replicas.scope():
        model = kit.keras.Sequential([layers.Input((1,)), layers.BatchNormalization()])
    column = X.reshape(len(X), -1)[:, 0]
    assert update_bn(model, Series(column)) == len(X)
    assert_statistics(kit, model.layers[-1], positions(column[:, None]))


def test_text(kit):
    model = kit.keras.Sequential(
        [
            kit.keras.layers.TextVectorization(output_sequence_length=2, vocabulary=["a", "b"]),
            kit.keras.layers.Embedding(4, 3),
            kit.keras.layers.BatchNormalization(),
        ]
    )
    text = np.array(["a b", "b", "a"])  # tokens 2 3, 3 0, 2 0
    model(tf.constant(text))
    embedded = kit.array(model.layers[1].trainable_variables[0])[[2, 3, 3, 0, 2, 0]]
    for data in (text, iter([text[:1], text[1:]])):
        shift(kit, model)
        assert update_bn(model, data, batch_size=2 if data is text else None) == 3
        assert_statistics(kit, model.layers[-1], positions(embedded))


def test_one_sample(kit, two_replicas):
    model = build(kit, two_replicas, norms=1)
    assert update_bn(model, X[:1]) == 1
    for mean, variance in zip(
        *(kit.replicas(v) for v in (model.layers[0].moving_mean, model.layers[0].moving_variance)),
        strict=True,
    ):
        assert_bitwise([mean, variance], [X[0], np.zeros(3)])


def test_masked_positions_do_not_count(kit, two_replicas):
    layers = kit.keras.layers
    model, (_, norm) = functional(
        kit, two_replicas, (4, 3), lambda: layers.Masking(-1.0), layers.BatchNormalization
    )
    x = np.arange(84, dtype="float32").reshape(7, 4, 3)
    x[2:5, 1:] = -1
    x[6] = -1
    assert update_bn(model, x, batch_size=3) == 7
    assert_statistics(kit, norm, positions(x)[(x != -1).any(-1).ravel()])


@with_renorm
def test_renorm_layers_normalize_plainly(kit):
    def make():
        return kit.keras.layers.BatchNormalization(renorm=True)

    model, (first, second) = functional(kit, NO_STRATEGY, (3,), make, make)
    first.moving_mean.assign([100.0, 100, 100])
    update_bn(model, X, batch_size=38)
    x = positions(X)
    assert_statistics(kit, first, x)
    assert_mean(kit.array(first.renorm_mean), x.mean(0), x.std(0))
    np.testing.assert_allclose(kit.array(second.moving_mean), 0, atol=1e-5)


def test_a_subclassed_model_with_control_flow_and_a_traced_call(kit):
    keras = kit.keras

    class Traced(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)
            self.built = True

        @tf.function
        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Traced()

        def call(self, inputs, training=None):
            # Keras 3 does not have it converted, in `fit` neither.
            if kit.name == "tf_keras" and tf.reduce_any(inputs > 1e9):
                inputs = 0 * inputs
            return self.inner(inputs, training=training)

    model = Model()
    model(X)
    model(X, training=True)  # traced, unobserved
    assert update_bn(model, X, batch_size=38) == 38
    assert_statistics(kit, model.inner.norm, positions(X))


def test_each_shape_is_traced_once_and_variable_ones_twice(kit, two_replicas):
    traces = []

    class Counting(kit.keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            traces.append(inputs.shape)
            return super().call(inputs, training=training)

    with two_replicas.scope():
        model = Counting([kit.keras.layers.BatchNormalization()])
        model.build((None, 3))
    traces.clear()
    update_bn(model, (X[i : i + 2] for i in range(0, 38, 2)))
    assert len(traces) == 2  # one for each replica
    traces.clear()
    update_bn(model, (X[:n] for n in (2, 4, 6, 8, 4, 10, 12)))
    assert len(traces) == 4


def test_a_generator_may_use_its_buffer_and_its_model_again(kit, two_replicas):
    model = build(kit, two_replicas)

    def reused():
        buffer = np.zeros((19, 3), "float32")
        for i in (0, 19):
            buffer[:] = X[i : i + 19]
            model(1000 * buffer, training=True)  # no position of the pass
            yield buffer

    assert update_bn(model, reused()) == 38
    assert_statistics(kit, model.layers[0], positions(X))


class AccidentError(Exception):
    pass


@pytest.mark.parametrize(("error", "after"), [(AccidentError, 0), (KeyboardInterrupt, 2)])
def test_an_exception_in_the_data_changes_nothing(kit, four_replicas, error, after):
    model = build(kit, four_replicas)
    shift(kit, model)
    before = copies(kit, model)

    def broken():
        yield from itertools.islice(batches((X, Y)), after)
        raise error("the data")

    with pytest.raises(error, match="the data"):
        update_bn(model, broken())
    assert_bitwise(copies(kit, model), before)
    assert_nothing_is_left_behind(kit, model)


@pytest.mark.parametrize("where", ["forward", "pool"])
def test_an_exception_in_the_pass_changes_nothing(kit, two_replicas, where, monkeypatch):
    with two_replicas.scope():
        fragile, healthy = kit.fragile()
    make = kit.keras.layers.BatchNormalization
    model, _ = functional(kit, two_replicas, (3,), make, lambda: fragile, make)
    shift(kit, model)
    before = copies(kit, model)

    def data():
        yield X
        if where == "forward":
            healthy.assign(False)
        yield X

    def interrupted(self):
        original(self)
        raise KeyboardInterrupt

    original = BatchNormStatistics.pool
    if where == "pool":
        monkeypatch.setattr(BatchNormStatistics, "pool", interrupted)
    with pytest.raises(tf.errors.OpError if where == "forward" else KeyboardInterrupt):
        update_bn(model, data())
    assert_bitwise(copies(kit, model), before)
    assert_nothing_is_left_behind(kit, model)


def assert_nothing_is_left_behind(kit, model):
    assert not hooks._OBSERVERS
    for cls in kit.keras.layers.BatchNormalization.__mro__:
        assert not hasattr(vars(cls).get("call"), "__wrapped__")
    for layer in model._flatten_layers():
        assert not {"call", "train_step"} & set(vars(layer))


EMPTY = {
    "generator": lambda: iter(()),
    "dataset": lambda: dataset((X,)).take(0),
    "arrays": lambda: X[:0],
    "batches without samples": lambda: iter([X[:0], X[:0]]),
    "peekable": lambda: peekable(()),
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_no_data_is_an_error_and_changes_nothing(kit, two_replicas, data):
    model = build(kit, two_replicas)
    shift(kit, model)
    before = copies(kit, model)
    with pytest.raises(ValueError, match=r"`data` must have samples. Received: \d batches"):
        update_bn(model, data())
    assert_bitwise(copies(kit, model), before)


def test_steps_take_no_more_than_they_say(kit):
    model = build(kit)
    assert update_bn(model, X, batch_size=8, steps=2) == 16
    assert_statistics(kit, model.layers[0], positions(X[:16]))
    fed = batches((X,))
    assert update_bn(model, fed, steps=1) == 8
    assert len(list(fed)) == 4
    assert update_bn(model, dataset((X, Y)), steps=99) == 38


def test_a_progress_bar_is_kerass(kit, capsys):
    model = build(kit)
    update_bn(model, X, batch_size=8)
    assert capsys.readouterr().out == ""
    update_bn(model, X, batch_size=8, verbose=1)
    assert "5/5" in capsys.readouterr().out
    update_bn(model, batches((X,)), verbose=1)
    assert "5/Unknown" in capsys.readouterr().out
    update_bn(model, sequence(kit, (X,)), steps=3, verbose=1)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["dataset", "distributed", "sequence"])
def test_data_without_end_needs_steps(kit, two_replicas, data):
    class Endless(kit.keras.utils.Sequence):
        num_batches = None

        def __len__(self):
            raise NotImplementedError

        def __getitem__(self, i):
            return X

    model = build(kit, two_replicas)
    fed = dataset((X,)).repeat()
    if data == "distributed":
        fed = two_replicas.experimental_distribute_dataset(fed)
    if data == "sequence":
        fed = Endless()
    with pytest.raises(ValueError, match=r"`steps` must be .* has no end. Received: steps=None"):
        update_bn(model, fed)
    assert update_bn(model, fed, steps=1) == (38 if data == "sequence" else 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"`steps` must be an integer >= 1, or None. Received: steps=0"),
        ({"steps": 1.5}, r"Received: steps=1.5"),
        ({"batch_size": 0}, r"`batch_size` must be an integer >= 1, or None. Received: batch_"),
        ({"verbose": 2}, r"`verbose` must be 0 or 1. Received: verbose=2"),
        ({"data": dataset((X,)), "batch_size": 8}, r"`batch_size` is for arrays"),
        ({"data": (X, Y[1:])}, r"equally many samples. Received: \[38, 37\]"),
        ({"data": (X, Y, WEIGHTS, X)}, r"Received: a tuple of 4. Put several inputs into"),
        ({"data": tf.data.Dataset.range(3)}, r"The inputs in a batch .* an array, .*tf.Tensor"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kit, arguments, message):
    model = build(kit)
    before = copies(kit, model)
    with pytest.raises(ValueError, match=message):
        update_bn(model, **{"data": X, **arguments})
    assert_bitwise(copies(kit, model), before)


def test_a_model_that_is_none_or_not_built_is_refused(kit):
    with pytest.raises(TypeError, match=r"`model` must be a model of .* Received: builtins.str"):
        update_bn("model", X)
    model = kit.keras.Sequential([kit.keras.layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"`model` must be built.* Received: 'sequential"):
        update_bn(model, X)


def test_a_model_of_another_strategy_is_refused(kit):
    strategy = tf.distribute.experimental.CentralStorageStrategy(devices(2), *devices(1))
    model = build(kit, strategy) if kit.name == "tf_keras" else build(kit)
    if kit.name == "keras3":
        model._distribute_strategy = mirrored(2)
    with pytest.raises(ValueError, match=r"Received: "):
        update_bn(model, X)


def test_a_call_that_cannot_be_observed_is_warned_of(kit):
    norm = kit.keras.layers.BatchNormalization()
    norm.build((None, 3))
    spec = tf.TensorSpec([None, 3])
    traced = tf.function(lambda x: norm(x, training=True), input_signature=[spec])
    traced(X)

    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.other = norm, kit.keras.layers.BatchNormalization()

        def call(self, inputs, training=None):
            return traced(self.other(inputs, training=training))

    model = Model()
    model(X)
    before = kit.statistics(norm)
    with pytest.warns(UserWarning, match=f"not recomputed: '{norm.name}'"):
        update_bn(model, X)
    assert_bitwise(kit.statistics(norm), before)


def test_the_models_own_keras_version_is_found(kit, monkeypatch):
    other = {"keras3": "tf_keras", "tf_keras": "keras"}[kit.name]
    monkeypatch.delitem(sys.modules, other)
    assert update_bn(build(kit), X) == 38
    assert other not in sys.modules
