"""Raise an error that says what to do if TensorFlow is missing. To be imported first."""

try:
    import tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "swa_dist needs TensorFlow, and leaves the choice of build to you. Install one: "
        "`pip install swa-dist[tensorflow]`, or [cpu], [gpu], [tpu]."
    ) from error
