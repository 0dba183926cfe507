"""The logical devices that tests run on: CPUs, or with SWA_TEST_DEVICE=GPU parts of one GPU."""

import os

import tensorflow as tf

KIND = os.environ.get("SWA_TEST_DEVICE", "CPU")
N_DEVICES = 4
_MIB_PER_GPU = 900

NO_STRATEGY = tf.distribute.get_strategy()


def set_up(n: int = N_DEVICES) -> None:
    """Give TensorFlow its devices, which must be done before anything else uses it."""
    if KIND not in ("CPU", "GPU"):
        raise ValueError(f"SWA_TEST_DEVICE must be CPU or GPU. Received: {KIND!r}.")
    # CPUs in either case: some tests are about them.
    _split(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * n)
    gpus = tf.config.list_physical_devices("GPU")
    if KIND == "CPU":
        tf.config.set_visible_devices([], "GPU")
        return
    if not gpus:
        raise RuntimeError("SWA_TEST_DEVICE=GPU, but TensorFlow finds no GPU.")
    tf.config.set_visible_devices(gpus[0], "GPU")
    _split(gpus[0], [tf.config.LogicalDeviceConfiguration(memory_limit=_MIB_PER_GPU)] * n)
    # It has 10 bits of mantissa, and oracles have 53.
    tf.config.experimental.enable_tensor_float_32_execution(False)


def devices(n: int) -> list[str]:
    """Return the names of n devices."""
    return [f"{KIND}:{i}" for i in range(n)]


def mirrored(n: int) -> tf.distribute.Strategy:
    """Return a MirroredStrategy over n devices."""
    # The default all-reduce forms its groups once a process: strategies of several sizes would
    # abort each other. tests/distribution/test_default_all_reduce.py has a process of its own.
    return tf.distribute.MirroredStrategy(
        devices(n), cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def on(n: int) -> tf.distribute.Strategy:
    """Return a MirroredStrategy over n devices; for 0, what is there without a strategy."""
    return mirrored(n) if n else NO_STRATEGY


def _split(device: tf.config.PhysicalDevice, parts: list) -> None:
    tf.config.set_logical_device_configuration(device, parts)
