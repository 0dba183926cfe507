"""How exact is exact, in one place."""

import numpy as np

# The project's promise: 1e-6 relative. A float32 holds 6e-8, so there is room for the roundings of
# a sum of a few dozen terms, and none for a wrong weight, a lost position or a divisor n - 1.
RELATIVE = 1e-6

# The average's own promise for some 500 updates: a float32 mean is rounded with each of them.
RELATIVE_OF_HUNDREDS = 3e-6


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
