"""What one averaging step costs: ours, the peers', and the least that memory allows."""

from collections.abc import Callable
from typing import Any

from scripts.bench import networks
from scripts.bench.clock import CLOCKS, alternate, timed

OURS, OURS_LATER, COPY, SWAP = "ours", "ours, after hundreds", "copy_to_model", "swap"
KERAS_SWA, LIMIT, FUSED, TORCH = "keras-swa", "limit", "XLA-fused", "PyTorch"
NOTHING, LOOK, ADD = "nothing", "look", "add"

# The average's buffers are sums for 32 snapshots. Warming up takes some of them: the first updates
# run without a graph.
WARM_UP = 10
ROUNDS = 32 - WARM_UP


def steps(
    network: list[Any], replicas: int, groups: list[list[str]], clock: str = "wall"
) -> dict[str, list[float]]:
    """Time averaging steps of a network's weights, and what belongs to them.

    Every contender has what it holds between two snapshots: ours buffers on every replica,
    keras-swa NumPy arrays.

    Args:
        network: What `networks.build` takes.
        replicas: How many there are; 0 for no strategy.
        groups: Those that take turns. Who was in an earlier group is there as a neighbor only.
        clock: Name of the clock.
    """
    import tensorflow as tf

    from swa_dist import WeightAverage

    strategy = networks.strategy(replicas)
    with strategy.scope():
        model = networks.build(*network)
        weights = [v if isinstance(v, tf.Variable) else v.value for v in model.trainable_variables]
        sums = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in weights]
        finite = tf.Variable(False, trainable=False)
    average = WeightAverage(model)
    size = sum(v.shape.num_elements() for v in weights)
    total, flat = (tf.Variable(tf.ones([size])) for _ in range(2))

    def look() -> None:
        finite.assign(tf.reduce_all([tf.math.is_finite(tf.reduce_sum(v)) for v in weights]))

    def add() -> None:
        for buffer, v in zip(sums, weights, strict=True):
            buffer.assign_add(v, read_value=False)

    def add_if_finite() -> None:
        all_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(v)) for v in weights])
        for buffer, v in zip(sums, weights, strict=True):
            buffer.assign(tf.where(all_finite, buffer + v, buffer), read_value=False)

    def add_flat() -> None:
        total.assign_add(flat, read_value=False)

    def graph(part: Callable[[], None]) -> Callable[[], None]:
        return tf.function(lambda: strategy.run(part), autograph=False)

    contenders: dict[str, Callable[[], Any]] = {
        **dict.fromkeys((OURS, OURS_LATER), average.update),
        COPY: average.copy_to_model,
        SWAP: average.swap,
        LIMIT: tf.function(add_flat),
        FUSED: tf.function(add_if_finite, jit_compile=True),
        NOTHING: graph(lambda: None),
        LOOK: graph(look),
        ADD: graph(add),
    }
    if KERAS_SWA in groups[0]:
        contenders[KERAS_SWA] = _keras_swa_step(model)
    seconds: dict[str, list[float]] = {}
    for group in groups:
        for _ in range(200 if OURS_LATER in group else 0):
            average.update()
        turns = {name: timed(contenders[name], CLOCKS[clock]) for name in group}
        seconds = alternate(turns, ROUNDS, WARM_UP) | seconds
    return seconds


def _keras_swa_step(model: Any) -> Callable[[], None]:
    """Return keras-swa's hooks of an epoch at whose end it averages, without the training."""
    from swa.tfkeras import SWA

    model.compile("sgd", "mse")
    callback = SWA(2, batch_size=1)
    callback.set_model(model)
    callback.set_params({"epochs": 1_000_000})
    callback.on_train_begin()
    epochs = iter(range(1, 1_000_000))

    def step() -> None:
        epoch = next(epochs)
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch)

    return step


def torch_step() -> list[float]:
    """Time PyTorch's own averaging of ResNet-50's weights on a GPU."""
    import torch
    import torchvision
    from torch.optim.swa_utils import AveragedModel

    model = torchvision.models.resnet50().cuda()
    average = AveragedModel(model)

    def update() -> None:
        average.update_parameters(model)
        torch.cuda.synchronize()

    return alternate({TORCH: timed(update)}, ROUNDS, WARM_UP)[TORCH]
