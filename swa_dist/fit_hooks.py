"""The hooks that Keras calls, passed on to the run of a `fit`."""

from typing import TYPE_CHECKING, Any, ClassVar

from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import check_eager
from swa_dist.plan.options import Options
from swa_dist.plan.progress import Progress
from swa_dist.run import Run
from swa_dist.state import RunState
from swa_dist.training.learning_rates import InitialOptimizers

if TYPE_CHECKING:  # at run time a binding puts its Keras's Callback here

    class _Callback:
        model: Any
        params: dict[str, Any]

        def set_model(self, model: Any) -> None: ...

else:
    _Callback = object


# In the parameters of a `fit`, which all of its callbacks share: a callback for it has begun.
_MARK = "swa_dist"


class FitHooks(_Callback):
    """A callback that makes a `Run` of each `fit`, and passes its hooks on to it.

    Args:
        options: The callback's options.
    """

    keras_api: ClassVar[KerasAPI]

    # tf_keras then does not wait for the device after each batch, to convert the logs to NumPy.
    _supports_tf_logs = True

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self._last_progress = Progress()
        self._optimizers_before: InitialOptimizers | None = None
        self._run: Run | None = None
        self._is_in_other_loop = False  # of `evaluate` or `predict`

    @property
    def _progress(self) -> Progress:
        return self._run.progress if self._run else self._last_progress

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: options and results, but neither model nor average."""
        state = {
            **vars(self),
            "_last_progress": self._progress,
            "_optimizers_before": None,
            "_run": None,
        }
        for name in ("_model", "model"):  # Keras 3's and tf_keras's
            if name in state:
                state[name] = None
        return state

    def set_model(self, model: Any) -> None:
        check_eager()
        self.keras_api.check_model(model)
        super().set_model(model)
        self._optimizers_before = self._optimizers_now()
        self._is_in_other_loop = True  # unless training begins

    def on_train_begin(self, logs: Any = None) -> None:
        params = getattr(self, "params", None) or {}
        if "epochs" not in params:
            raise ValueError(
                "SWA must know how many epochs `fit` trains. Received: a CallbackList without the "
                "parameter `epochs`. Make it with `CallbackList(..., epochs=...)`, or give `fit` a "
                "list of callbacks."
            )
        if params.get(_MARK):
            raise ValueError(
                "`callbacks` must have one SWA: two in one `fit` would undo each other's work. "
                "Received: a second one."
            )
        params[_MARK] = True
        self._is_in_other_loop = False
        self._run = None  # of a `fit` that an exception has ended
        # A CallbackList that serves several fits sets the model once, before the first.
        before = self._optimizers_before or self._optimizers_now()
        self._optimizers_before = None
        self._run = Run(RunState(self.options, self.model, params, self.keras_api, before))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.params.pop(_MARK, None)
        self._running.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._run:
            self._run.begin_batch(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._run:
            self._run.end_batch()

    def on_test_begin(self, logs: Any = None) -> None:
        if self._run and not self._is_in_other_loop:
            self._run.begin_test()

    def on_test_end(self, logs: Any = None) -> None:
        self._is_in_other_loop = False

    def on_predict_end(self, logs: Any = None) -> None:
        self._is_in_other_loop = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._running.end_epoch(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        run = self._running
        try:
            run.end()
        finally:
            # The buffers are as large as the weights.
            self._last_progress = run.progress
            self._run = None

    def _optimizers_now(self) -> InitialOptimizers:
        return InitialOptimizers.of(self.keras_api.step_optimizers(self.model))

    @property
    def _running(self) -> Run:
        if not self._run:
            raise RuntimeError(
                "This SWA has been used in another `fit` while this one was running. Give each "
                "`fit` that runs at the same time an SWA of its own."
            )
        return self._run
