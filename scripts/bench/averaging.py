"""What one averaging step costs: ours, keras-swa's, and the least that memory allows."""

from collections.abc import Callable
from typing import Any

from scripts.bench import networks, peers
from scripts.bench.clock import Times, alternate

OURS, OURS_LATER, KERAS_SWA, LIMIT = "ours", "ours, later", "keras-swa", "limit"
NOTHING, LOOK, ADD = "nothing", "look", "add"

# The average's buffers are sums for that many snapshots. Warming up takes some of them: the first
# updates run without a graph.
_SUMS, _WARM_UP = 32, 10
ROUNDS = _SUMS - _WARM_UP
_HUNDREDS = 200  # updates between the first ones and the later ones that are timed


def on_resnet50(replicas: int, quick: bool) -> dict[str, Any]:
    """Time a step on ResNet-50's weights, and its parts on one replica.

    Every contender has what it holds between two snapshots: ours buffers on every replica,
    keras-swa NumPy arrays. The limit is an in-place addition of one flat tensor to another.
    """
    import tensorflow as tf

    strategy = networks.mirrored(replicas)
    with strategy.scope():
        if quick:
            model = networks.equal_weights(tf.keras, 200_000, 20)
        else:
            model = networks.resnet50(tf.keras)
    contenders = _contenders(model, with_limit=replicas == 1)
    seconds = alternate(contenders, ROUNDS, _WARM_UP)
    for _ in range(_HUNDREDS):
        contenders[OURS]()
    later = {OURS_LATER: contenders[OURS], **_without(contenders, OURS)}
    seconds[OURS_LATER] = alternate(later, ROUNDS, _WARM_UP)[OURS_LATER]
    parts = alternate(_parts(model, strategy), ROUNDS, _WARM_UP) if replicas == 1 else {}
    return {
        "parameters": _size(model),
        "variables": len(model.trainable_variables),
        "seconds": seconds,
        "parts": parts,
    }


def on_equal_weights(parameters: int, variables: int, rounds: int) -> Times:
    """Time a step on so many parameters in so many equal variables, on one replica."""
    import tensorflow as tf

    with networks.mirrored(1).scope():
        model = networks.equal_weights(tf.keras, parameters, variables)
    return alternate(_contenders(model, with_limit=True), min(rounds, ROUNDS), _WARM_UP)


def grow(sizes: list[tuple[int, int]], rounds: int) -> list[Times]:
    """Time a step for each number of parameters and variables, one after the other."""
    import gc

    times = []
    for parameters, variables in sizes:
        times.append(on_equal_weights(parameters, variables, rounds))
        gc.collect()
    return times


def _contenders(model: Any, with_limit: bool) -> dict[str, Callable[[], None]]:
    from swa_dist import WeightAverage

    contenders = {OURS: WeightAverage(model).update, KERAS_SWA: _keras_swa_step(model)}
    if with_limit:
        contenders[LIMIT] = _flat_addition(_size(model))
    return contenders


def _keras_swa_step(model: Any) -> Callable[[], None]:
    """Return keras-swa's hooks of an epoch at whose end it averages, without the training."""
    model.compile("sgd", "mse")
    callback = peers.keras_swa_callback(2, batch_size=1)
    callback.set_model(model)
    callback.set_params({"epochs": 1_000_000})
    callback.on_train_begin()
    epochs = iter(range(1, 1_000_000))

    def step() -> None:
        epoch = next(epochs)
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch)

    return step


def _flat_addition(size: int) -> Callable[[], None]:
    import tensorflow as tf

    total, weights = (tf.Variable(tf.ones([size])) for _ in range(2))

    @tf.function
    def add() -> None:
        total.assign_add(weights, read_value=False)

    return lambda: add()


def _size(model: Any) -> int:
    return sum(v.shape.num_elements() for v in model.trainable_variables)


def _parts(model: Any, strategy: Any) -> dict[str, Callable[[], None]]:
    """Return what an update does, part by part: each in a graph of its own."""
    import tensorflow as tf

    variables = model.trainable_variables
    with strategy.scope():
        sums = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in variables]
        finite = tf.Variable(False, trainable=False)

    def look() -> None:
        finite.assign(tf.reduce_all([tf.math.is_finite(tf.reduce_sum(v)) for v in variables]))

    def add() -> None:
        for total, v in zip(sums, variables, strict=True):
            total.assign_add(v, read_value=False)

    return {
        name: tf.function(lambda part=part: strategy.run(part), autograph=False)
        for name, part in {NOTHING: lambda: None, LOOK: look, ADD: add}.items()
    }


def _without(contenders: dict[str, Callable[[], None]], name: str) -> dict[str, Callable[[], None]]:
    return {other: contend for other, contend in contenders.items() if other != name}
