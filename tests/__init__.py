"""Tests, and programs that tests run: what holds for every process of theirs."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from tensorflow.python.data.ops.dataset_ops import DatasetV2

# Seconds after which a program that a test has started is taken to hang. So many that a slow and
# busy machine cannot make them pass: the longest has taken 9 minutes on one.
FOREVER = 2 * 3600


def _without_autotuning(dataset):
    """Apply what a dataset's `Options` have no public default for.

    An iterator that is dropped waits for its autotuning thread, which may sleep on for a minute
    (seen with TensorFlow 2.21), and Keras 3 drops one in each epoch.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


# What TensorFlow calls on each dataset of which it makes an iterator.
DatasetV2._apply_debug_options = _without_autotuning
