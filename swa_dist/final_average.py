"""What a run leaves in its model: the average, with batch normalization statistics of it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from swa_dist.batch_norm.forward_pass import ForwardPass
from swa_dist.data.data_kinds import are_arrays
from swa_dist.model_checks import tensorflow_variable
from swa_dist.plan import messages
from swa_dist.state import RunState


class FinalAverage:
    """The average of a run as what its model ends with.

    Args:
        state: The state of the run.
        save: Saves a checkpoint of it as it was after so many epochs.
    """

    def __init__(self, state: RunState, save: Callable[[int], bool]) -> None:
        self._state, self._save = state, save
        self._forward_pass: ForwardPass | None = None

    @property
    def is_recomputed(self) -> bool:
        """Whether the BN statistics come from `bn_data`."""
        return self._state.options.bn_data is not None and self._state.plan.batch_norm

    @property
    def is_in_model(self) -> bool:
        """Whether a model that was saved before the run was resumed has it, with its statistics."""
        if self.is_recomputed:
            return False
        if not self._state.plan.batch_norm:
            return True
        average, progress = self._state.snapshots.average, self._state.progress
        if average.statistics_of_model == progress.final_statistics:
            return True
        # It may have been saved before the average was.
        rates = self._state.rates.optimizers.read_rates().values()
        return all(rates) and average.weights.equals_model

    def recompute(self, for_good: bool = False) -> None:
        """Recompute the statistics from `bn_data`, of the average, which is in the model.

        Args:
            for_good: Whether the model is to keep the average if the data fails, although it only
                carries it so far.

        Raises:
            Exception: The data failed. The statistics are as they were.
        """
        state = self._state
        layers = [layer.keras_layer for layer in state.keras_api.trainable_batch_norm(state.model)]
        if not layers:  # all have been frozen
            return
        epoch = state.plan.epochs - 1 if state.position.epoch is None else state.position.epoch
        state.print(messages.of_epoch(epoch, messages.RUNNING_OVER_BN_DATA))
        if not self._forward_pass or self._forward_pass.keras_layers != layers:
            weights = state.snapshots.average.weights.weights
            self._forward_pass = ForwardPass(state.model, state.keras_api, unwritten=weights)
        data = state.options.bn_data
        # Batches as in training: a BN layer normalizes its inputs with the moments of the batch.
        size = state.progress.batch_size if are_arrays(data) else None
        try:
            with self._writing_statistics(), self._keeping_other_state():
                self._forward_pass.run(data, size, state.options.bn_steps, state.options.verbose)
        except BaseException:
            if for_good:
                state.end_carrying()
                state.snapshots.average.copy_to_model()
            raise
        state.move(has_recomputed=True)

    def reapply(self) -> None:
        """Assign the statistics once more, if they have been recomputed in this epoch."""
        if self._state.position.has_recomputed and self._forward_pass:
            with self._writing_statistics():
                self._forward_pass.reapply()

    def put(self) -> None:
        """Give the average to the model for good."""
        self._state.snapshots.average.copy_to_model()
        if self.is_recomputed and not self._state.position.has_recomputed:
            self.recompute()
        else:
            self.reapply()

    def leave(self) -> None:
        """Have the model end with the average, and warn of what it has to do without."""
        state = self._state
        epoch, bn_pass = state.position.epoch, state.position.bn_pass
        is_due = self.is_recomputed and not state.position.has_recomputed
        if is_due and epoch is not None and epoch + 1 < state.plan.epochs:
            # The data may take long: a run that is resumed must know that training is over.
            state.note_stop(epoch)
            self._save(epoch + 1)
        # Again after a BN pass: an optimizer with `use_ema`, or a callback that restores earlier
        # weights, has just put others there.
        self.put()
        if self.is_recomputed or not state.plan.batch_norm:
            state.print(messages.of_epoch(state.plan.epochs, messages.FINAL))
            if self._forward_pass and self._forward_pass.unobserved:
                names = self._forward_pass.unobserved
                state.warn(messages.unobserved_layers(names, averaged=True))
        elif bn_pass and bn_pass.has_statistics:
            for message in bn_pass.reapply():
                state.warn(message)
        else:
            began = bn_pass is not None
            state.warn(messages.no_bn_pass(epoch, state.n_averaged, began))

    def _writing_statistics(self) -> AbstractContextManager[None]:
        snapshots = self._state.snapshots
        if snapshots.average_is_carried:
            return snapshots.average.writing_statistics()
        return nullcontext()

    @contextmanager
    def _keeping_other_state(self) -> Iterator[None]:
        """Have what is neither weights nor BN statistics, such as random seeds, end as it began."""
        model, average = self._state.model, self._state.snapshots.average
        ours = {id(v) for v in [*average.weights.weights, *average.statistics]}
        local = model.distribute_strategy.experimental_local_results
        others = [v for v in map(tensorflow_variable, model.variables) if id(v) not in ours]
        copies = [copy for v in others for copy in local(v)]
        before = [copy.read_value() for copy in copies]
        try:
            yield
        finally:
            for copy, value in zip(copies, before, strict=True):
                copy.assign(value)
