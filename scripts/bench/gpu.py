"""What averaging costs on a GPU, ours and PyTorch's on the same card."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.bench import isolated, networks, report
from scripts.bench.clock import Times, alternate, step_timer, time_hooks
from scripts.bench.cost import KERAS_VERSIONS, ms, ratio, s
from scripts.bench.report import Page

COMMAND = "./scripts/benchmark --gpu"
OURS, OURS_LATER, COPY, SWAP = "ours", "ours, after hundreds", "copy_to_model", "swap"
LIMIT, FUSED, TORCH = "limit", "XLA-fused", "PyTorch"
ROUNDS, WARM_UP = 22, 10  # the first 32 updates are sums, the first 8 run without a graph
PIXELS, BATCH, STEPS = 224, 128, 12


def main() -> None:
    """Measure all on the first GPU, and write the page."""
    options = report.arguments("Measure what averaging costs on a GPU.", COMMAND)
    page = Page(
        options,
        "gpu.md",
        "# Cost on a GPU",
        report.provenance(COMMAND, options.quick, "tensorflow", "keras", "tf_keras", "numpy"),
        f"Card: {isolated.call(card, gpu=True)}. Times are medians, with quartiles in brackets, of "
        "calls that waited for the card before and after.",
    )
    for section in (one_update, fit):
        print(f"{section.__doc__} ...", flush=True)
        section(page)
        page.write()


def one_update(page: Page) -> None:
    """One update on ResNet-50's weights."""
    times = isolated.call(updates, page.quick, gpu=True)
    rows = [[name, ms(seconds)] for name, seconds in times.items()]
    page.add(
        "## One update",
        "On the trainable weights of ResNet-50. The limit is the in-place addition of one flat "
        "tensor of that size to another; XLA-fused is one compiled function that adds each "
        "variable unless a value is not finite; PyTorch's is `AveragedModel.update_parameters`.",
    )
    why = (
        "the host issues an operation for each of the 214 weights, which takes it longer than the "
        "card needs for all of them (see the limit)"
    )
    for name in (OURS, OURS_LATER):
        found = float(np.median(times[name]) / np.median(times[FUSED]))
        page.aim(f"{name} / XLA-fused", found, 1.2, why)
    for name in (COPY, SWAP):
        page.aim(f"{name}, ms", float(np.median(times[name])) * 1e3, 2, why)
    try:
        torch = isolated.call(torch_updates, page.quick, gpu=True)
    except isolated.FailedError as error:
        rows.append([TORCH, str(error)])
    else:
        rows.append([TORCH, ms(torch[TORCH])])
        for name in (OURS, OURS_LATER):
            found = float(np.median(times[name]) / np.median(torch[TORCH]))
            page.aim(f"{name} / PyTorch's `AveragedModel`", found, 0.5, why)
    page.add(report.table(["", "time"], rows))


def fit(page: Page) -> None:
    """A fit of ResNet-50."""
    rows = []
    for version, legacy in KERAS_VERSIONS.items():
        found = isolated.call(one_fit, page.quick, legacy=legacy, gpu=True)
        training, bn_pass = found["training"], found["pass"]
        updated = ratio(found["updated"], float(np.median(found["plain"])))
        steps_of = (ms(training), ms(bn_pass), ms(found["updated"]), updated.show())
        rows.append([version, *steps_of, *(s(found[k]) for k in ("first", "hooks", "bn", "end"))])
    page.add(
        "## A `fit`",
        f"ResNet-50 at {PIXELS}x{PIXELS}, batches of {BATCH}, `mixed_bfloat16`, under "
        "`MirroredStrategy` with one GPU.",
        report.table(
            [
                *("Keras", "training step", "step of the BN pass", "step with an update"),
                *("with / without", "first training step", "SWA's hooks, in all"),
                *("first step of the BN pass", "end of the BN pass"),
            ],
            rows,
        ),
    )


# What is measured, each in a process of its own


def card() -> str:
    """Return the name of the first GPU."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise RuntimeError("TensorFlow finds no GPU.")
    return str(tf.config.experimental.get_device_details(gpus[0])["device_name"])


def updates(quick: bool) -> Times:
    """Time an update, ours and others, and what puts the average into the model."""
    import tensorflow as tf

    from swa_dist import WeightAverage

    model = networks.resnet50(tf.keras, 32 if quick else PIXELS)
    weights = [v if isinstance(v, tf.Variable) else v.value for v in model.trainable_variables]
    size = sum(v.shape.num_elements() for v in weights)
    total, flat = (tf.Variable(tf.ones([size])) for _ in range(2))
    sums = [tf.Variable(tf.zeros(v.shape)) for v in weights]

    @tf.function
    def add_flat() -> None:
        total.assign_add(flat, read_value=False)

    @tf.function(jit_compile=True)
    def fused() -> None:
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in weights]))
        for total, v in zip(sums, weights, strict=True):
            total.assign(tf.where(finite, total + v, total), read_value=False)

    average = WeightAverage(model)
    contenders = {OURS: average.update, LIMIT: add_flat, FUSED: fused}
    times = alternate(_synchronized(contenders), ROUNDS, WARM_UP)
    for _ in range(200):
        average.update()
    later = {OURS_LATER: average.update, COPY: average.copy_to_model, SWAP: average.swap}
    # An even number of swaps, and no update while the average is in the model.
    for name, contend in later.items():
        times |= alternate(_synchronized({name: contend}), ROUNDS, WARM_UP)
    return times


def torch_updates(quick: bool) -> Times:
    """Time PyTorch's own averaging of the same network."""
    import torch
    import torchvision
    from torch.optim.swa_utils import AveragedModel

    model = torchvision.models.resnet50().cuda()
    average = AveragedModel(model)

    def update() -> None:
        average.update_parameters(model)
        torch.cuda.synchronize()

    return alternate({TORCH: update}, 3 if quick else ROUNDS, WARM_UP)


def one_fit(quick: bool) -> dict[str, Any]:
    """Time a `fit` with SWA, and steps with and without an update of an average.

    Returns:
        Seconds of steps of the "training" and of the BN "pass"; of what is done once: the "first"
        training step, SWA's "hooks" in all, the first step of the BN pass ("bn") and its "end"; of
        "plain" steps, and of those "updated" after each of which the average is.
    """
    import tensorflow as tf

    from swa_dist import SWA, WeightAverage

    keras = tf.keras
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    pixels, batch, steps = (32, 8, 4) if quick else (PIXELS, BATCH, STEPS)
    with tf.distribute.MirroredStrategy(["GPU:0"]).scope():
        model = networks.resnet50(keras, pixels)
        model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9), keras.losses.SparseCategoricalCrossentropy()
        )
    one = tf.random.normal([batch, pixels, pixels, 3]), tf.zeros([batch], tf.int32)
    data = tf.data.Dataset.from_tensors(one).cache().repeat(steps)
    clock, swa = step_timer(_synchronized_clock), SWA(2)
    spent = time_hooks(swa, _synchronized_clock)
    model.fit(data, epochs=4, verbose=0, callbacks=[clock, swa])
    training, bn_pass = clock.steps[0], clock.steps[-1]

    average = WeightAverage(model)
    for _ in range(34):
        average.update()

    class Updater(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            average.update()

    plain, updated = step_timer(_synchronized_clock), step_timer(_synchronized_clock)
    model.fit(data, epochs=2, verbose=0, callbacks=[plain])
    model.fit(data, epochs=2, verbose=0, callbacks=[updated, Updater()])
    return {
        "training": clock.steps[1][1:-1],
        "pass": bn_pass[1:-1],
        "first": [training[0]],
        "hooks": [sum(map(sum, spent.values()))],
        "bn": [bn_pass[0]],
        "end": [max(bn_pass[-1] - float(np.median(bn_pass[1:-1])), 0.0)],
        "plain": plain.steps[1][1:-1],
        "updated": updated.steps[1][1:-1],
    }


def _synchronized_clock() -> float:
    import tensorflow as tf

    tf.test.experimental.sync_devices()
    return time.perf_counter()


def _synchronized(contenders: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], None]]:
    """Return contenders that wait for the card."""
    import tensorflow as tf

    def waiting(contend: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            contend()
            tf.test.experimental.sync_devices()

        return call

    return {name: waiting(contend) for name, contend in contenders.items()}


if __name__ == "__main__":
    main()
