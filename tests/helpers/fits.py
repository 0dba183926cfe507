"""Short fits with SWA."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.helpers.data import data

# Three epochs of training, of which the third has the only snapshot, and the BN pass: the average
# is bitwise that snapshot.
ONE_SNAPSHOT = {"start_epoch": 3, "epochs": 4}


class Fit(NamedTuple):
    """What a `fit` leaves behind.

    Attributes:
        recorder: A `Recorder`, which stood before SWA.
        swa: The callback.
        history: The logs of its epochs.
    """

    recorder: Any
    swa: Any
    history: Mapping[str, Any]


def fit(
    kit, model, before=(), after=(), start_epoch=2, epochs=9, fed=None, swa=None, recorder=None,
    **arguments,
):  # fmt: skip
    """Fit a model with SWA among other callbacks.

    Args:
        before: Callbacks that stand before SWA, and before the recorder.
        after: Callbacks that stand after SWA.
        fed: Arrays x and y, or what has both; `data()` unless given. Arrays are in batches of 8.
        swa: The callback; an `SWA(start_epoch)` unless given.
        recorder: The recorder; a new one unless given.
        arguments: What `fit` gets besides.
    """
    if fed is None:
        fed = data()
    if isinstance(fed, tuple):
        arguments = {"batch_size": 8, **arguments}
    x, y = fed if isinstance(fed, tuple) else (fed, None)
    recorder, swa = recorder or kit.Recorder(), swa or kit.SWA(start_epoch)
    history = model.fit(
        x, y, epochs=epochs, callbacks=[*before, recorder, swa, *after],
        **{"verbose": 0, "shuffle": False, **arguments},
    )  # fmt: skip
    return Fit(recorder, swa, history.history)
