"""SWA in a Kaggle kernel, on what there is: a TPU, else GPUs, else the CPU as four virtual ones.

Paste it into a notebook cell after `!pip install swa-dist`, or run `python kaggle_kernel.py`.
"""

from importlib.util import find_spec

import tensorflow as tf
from sklearn.datasets import load_digits

from swa_dist import SWA

keras = tf.keras
EPOCHS, START, BATCH = 20, 15, 16  # the batch is one replica's


def find_strategy() -> tf.distribute.Strategy:
    """Return the strategy for the accelerators of this machine."""
    if find_spec("libtpu"):
        tpu = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.config.experimental_connect_to_cluster(tpu)
        tf.tpu.experimental.initialize_tpu_system(tpu)
        return tf.distribute.TPUStrategy(tpu)
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    # The default way to add up CPUs' gradients fails with Keras 3 and `steps_per_execution`.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(4)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


strategy = find_strategy()
batch = BATCH * strategy.num_replicas_in_sync
print(f"{type(strategy).__name__}, {strategy.num_replicas_in_sync} replicas, batches of {batch}")

images, labels = load_digits(return_X_y=True)  # 1,797 real digits of 8 x 8
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
labels = labels.astype("int32")
train = tf.data.Dataset.from_tensor_slices((images[:1536], labels[:1536])).cache()
train = train.shuffle(1536, seed=0).batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
test = tf.data.Dataset.from_tensor_slices((images[1536:1792], labels[1536:1792]))
test = test.batch(batch, drop_remainder=True)

with strategy.scope():
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=4,
    )

swa = SWA(start_epoch=START, lr_schedule="constant", swa_lr=0.05, verbose=1)
history = model.fit(train, epochs=EPOCHS, validation_data=test, verbose=2, callbacks=[swa])
model.save("model.keras")

accuracy = history.history["val_accuracy"][-1]
print(f"The average of {swa.n_averaged} epochs is right on {accuracy:.1%} of the test digits.")
