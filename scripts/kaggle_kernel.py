"""SWA over folds in a Kaggle kernel, on what there is: a TPU, else GPUs, else four virtual CPUs.

Paste it into a notebook cell after `!pip install swa-dist`, or run `python kaggle_kernel.py`. A
session that is cut off goes on where it was when this is run again beside its folder `output`.
"""

from importlib import metadata
from pathlib import Path

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from swa_dist import SWA

keras = tf.keras
FOLDS, EPOCHS, START, BATCH = 3, 20, 15, 16  # the batch is one replica's
OUTPUT = Path("output")


def find_strategy() -> tf.distribute.Strategy:
    """Return the strategy for the accelerators of this machine; a TPU is initialized anew."""
    installed = {distribution.name for distribution in metadata.distributions()}
    if "tensorflow-tpu" in installed:
        tpu = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.config.experimental_connect_to_cluster(tpu)
        tf.tpu.experimental.initialize_tpu_system(tpu)
        return tf.distribute.TPUStrategy(tpu)
    if "libtpu" in installed:  # as in Kaggle's image for TPUs
        raise RuntimeError(
            "This machine is made for TPUs, and its TensorFlow is not. Run `pip uninstall -y "
            "tensorflow-cpu && pip install tensorflow-tpu==2.20.0`, and restart the session."
        )
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    if not tf.config.get_logical_device_configuration(cpu):
        four = [tf.config.LogicalDeviceConfiguration()] * 4
        tf.config.set_logical_device_configuration(cpu, four)
    # The default way to add up CPUs' gradients fails with Keras 3 and `steps_per_execution`.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(4)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def build_model(steps: int) -> tf.keras.Model:
    """Return a small network, compiled to run the steps of a whole epoch in one execution."""
    layers = keras.layers
    model = keras.Sequential([layers.Input((8, 8, 1))])
    for width in (16, 32):
        model.add(layers.Conv2D(width, 3, use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=steps,
    )
    return model


images, labels = load_digits(return_X_y=True)  # 1,797 real digits of 8 x 8
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
labels = labels.astype("int32")
fold_of = np.random.default_rng(0).permutation(len(images)) % FOLDS

accuracies = []
for fold in range(FOLDS):
    strategy = find_strategy()
    batch = BATCH * strategy.num_replicas_in_sync
    print(f"Fold {fold}: {type(strategy).__name__}, batches of {batch}")

    def batches(chosen: np.ndarray) -> tf.data.Dataset:
        """Return the samples that are chosen, in batches of one size, as TPUs need them."""
        data = tf.data.Dataset.from_tensor_slices((images[chosen], labels[chosen]))
        shuffled = data.shuffle(len(images), seed=0)
        return shuffled.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)  # noqa: B023

    train, test = batches(fold_of != fold), batches(fold_of == fold)
    folder = OUTPUT / f"fold{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    averaged, best = folder / "averaged.weights.h5", folder / "best.weights.h5"
    keras.backend.clear_session()
    with strategy.scope():
        model = build_model(len(train))
        model.optimizer.build(model.trainable_variables)  # as it is when weights are loaded
    if averaged.exists():
        model.load_weights(averaged)  # of a session that was cut off later
    else:
        resume = keras.callbacks.BackupAndRestore(str(folder / "model"))
        best_before = None
        if best.exists():  # of a session that was cut off, which the callback has forgotten
            model.load_weights(best)
            best_before = model.evaluate(test, verbose=0)[1]
        save_best = keras.callbacks.ModelCheckpoint(
            *(str(best), "val_accuracy"),
            mode="max",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=best_before,
        )
        swa = SWA(
            *(START, "constant"),
            swa_lr=0.05,
            verbose=1,
            backup_dir=folder / "swa",
            bn_data=train,  # so that the last epoch trains, too
        )
        callbacks = [resume, swa, save_best]
        model.fit(train, epochs=EPOCHS, validation_data=test, verbose=2, callbacks=callbacks)
        model.save_weights(averaged)
    accuracies.append(model.evaluate(test, verbose=0)[1])

print(f"The averages are right on {np.mean(accuracies):.1%} of the digits that they have not seen.")
