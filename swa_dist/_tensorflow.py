"""Says what to do where TensorFlow is missing. A binding imports this before anything else."""

try:
    import tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "swa_dist needs TensorFlow, and leaves the choice of build to you. Install one: "
        "`pip install swa-dist[tensorflow]`, or [cpu], [gpu], [tpu]."
    ) from error
