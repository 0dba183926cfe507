"""How exact is exact, in one place; and what must hold after a `fit`."""

import numpy as np
import pytest

from swa_dist.batch_norm.bn_pass import BatchNormPass
from tests.helpers.data import batched, data, positions
from tests.helpers.models import RATE, norm_of

# The project's promise: 1e-6 relative. A float32 holds 6e-8, so there is room for the roundings of
# a sum of a few dozen terms, and none for a wrong weight, a lost position or a divisor n - 1.
RELATIVE = 1e-6

# The average's own promise for some 500 updates: a float32 mean is rounded with each of them.
RELATIVE_OF_HUNDREDS = 3e-6


# Of the weights of two trainings whose operations round in different places: with each step the
# differences grow.
RELATIVE_OF_TRAINING = 1e-5


def assert_mean(actual, expected, spread):
    """Statistics are compared on the scale of the data: a mean of 1e-9 times the spread is 0."""
    scale = np.maximum(np.abs(expected), spread)
    error = np.abs(np.asarray(actual, np.float64) - expected) / scale
    assert error.max() <= RELATIVE, f"off by {error.max():.2e}"


def assert_variance(actual, expected):
    error = np.abs(np.asarray(actual, np.float64) / expected - 1)
    assert error.max() <= RELATIVE, f"off by {error.max():.2e}"


def assert_weights(actual, expected, relative=RELATIVE):
    """Each array is compared on the scale of its largest entry."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        error = np.abs(np.asarray(a, np.float64) - e).max(initial=0)
        error /= max(np.abs(e).max(initial=0), 1e-30)
        assert error <= relative, f"off by {error:.2e}"


def assert_bitwise(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def assert_statistics(kit, layer, seen):
    """A BN layer has the statistics of positions, an array (positions, channels)."""
    mean, variance = kit.statistics(layer)
    assert_mean(mean.ravel(), seen.mean(0), seen.std(0))
    assert_variance(variance.ravel(), seen.var(0))


def assert_exact(kit, model, recorder, snapshots, seen=None):
    """The model has the mean of the snapshots, and statistics of what it was fed in the BN pass."""
    assert_weights(kit.trainable(model), recorder.mean(*snapshots))
    seen = positions(data()[0]) if seen is None else seen
    assert_statistics(kit, norm_of(model), seen)
    assert_undisturbed(kit, model)


def assert_undisturbed(kit, model):
    """The model is as it was without SWA, and ready to train on."""
    kit.assert_replicas_agree(model)
    assert kit.rate(model) == pytest.approx(RATE)
    assert "make_train_function" not in vars(model)
    assert not isinstance(model.train_function, BatchNormPass)


def assert_trains_on(kit, model):
    """A later `fit` updates the weights, and the optimizer's state."""
    state = kit.optimizer_state(model.optimizer)
    model.fit(batched(*data()), shuffle=False, verbose=0)
    moved = zip(state, kit.optimizer_state(model.optimizer), strict=True)
    assert any((a != b).any() for a, b in moved)


class Statistics:
    """The definition of the statistics that an average without a BN pass has.

    Of each snapshot those of the replicas, pooled with equal weight; of the snapshots their mean.
    """

    def __init__(self, kit, *epochs):
        self.snapshots = []

        class Keep(kit.keras.callbacks.Callback):
            def on_epoch_end(_, epoch, logs=None):  # noqa: N805
                if epoch + 1 in epochs:
                    norm = norm_of(_.model)
                    means = np.array(kit.replicas(norm.moving_mean), np.float64)
                    variances = np.array(kit.replicas(norm.moving_variance), np.float64)
                    self.snapshots.append((means.mean(0), variances.mean(0) + means.var(0)))

        self.callback = Keep()

    def assert_averaged(self, kit, model):
        mean, variance = (np.mean(s, 0) for s in zip(*self.snapshots, strict=True))
        actual_mean, actual_variance = kit.statistics(norm_of(model))
        assert_mean(actual_mean, mean, 0)
        assert_variance(actual_variance, variance)
