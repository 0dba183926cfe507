"""One `fit` with SWA: what happens at each hook, in the order in which training calls them."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from swa_dist.batch_norm.bn_pass import BatchNormPass
from swa_dist.final_average import FinalAverage
from swa_dist.model_checks import trainable_variables
from swa_dist.plan import errors, messages
from swa_dist.plan.progress import Progress
from swa_dist.resume.checkpoints import CheckpointError
from swa_dist.resume.saved_run import SavedRun
from swa_dist.resume.start import find_start, warnings_of
from swa_dist.state import RunState


class Run:
    """One `fit`, from `on_train_begin` to `on_train_end`, or until the next one begins.

    Args:
        state: Its state, at the beginning.

    Raises:
        OSError: `backup_dir` cannot be used.
    """

    def __init__(self, state: RunState) -> None:
        self._state, self._model = state, state.model
        self._options, self._keras_api = state.options, state.keras_api
        self._saved = SavedRun.open(state.options, state.model, state.keras_api)
        self._final = FinalAverage(state, self._save)
        if state.plan.ends_with_bn_pass:
            state.print(messages.HAS_BATCH_NORM)

    @property
    def progress(self) -> Progress:
        """How far the run has come, with the snapshots of an unfinished epoch."""
        return replace(self._state.progress, n_averaged=self._state.snapshots_so_far)

    # The hooks

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch; before the first of them, find out where the run starts."""
        state = self._state
        state.end_carrying()
        before = state.position
        if before.average_is_final:
            state.warn(messages.stop_withdrawn(epoch))
        if before.epoch is None:
            self._start(epoch)
        elif not before.bn_pass:
            state.rates.optimizers = self._keras_api.step_optimizers(self._model)  # compiled anew?
            state.follow_weights(epoch)
        state.begin_epoch(epoch)
        if self._saved:
            self._saved.begin_epoch()
        if state.plan.is_start(epoch):
            state.print(messages.of_epoch(epoch, messages.STARTING))
        if not state.plan.is_bn_pass(epoch):
            state.rates.set(epoch)
        elif state.n_averaged:
            self._begin_bn_pass(epoch)

    def begin_batch(self, batch: int) -> None:
        """Set learning rates that change within the epoch, and look out for its last batch."""
        state = self._state
        epoch = state.position.epoch
        if epoch is None:
            return
        if state.position.is_closed and state.snapshots.average_is_carried:
            state.end_carrying()
            state.warn(messages.epoch_continues(epoch))
        if state.plan.changes_within(epoch):
            state.rates.set(epoch, batch)
        state.keep_step_snapshots()
        expected = state.position.declared_steps
        if self._saved and state.plan.averages_steps(epoch):
            expected = expected or state.plan.steps_per_epoch
        elif not self._ends_with_average(epoch):
            return
        if expected:
            known = state.position.steps_per_execution
            steps = self._keras_api.steps_per_execution(self._model, known)
            is_last = batch + steps >= expected
            state.move(is_last_batch=is_last, steps_per_execution=steps)

    def end_batch(self) -> None:
        """Look for weights that the first step has built; after the last step carry the average."""
        state = self._state
        position = state.position
        if position.has_stepped and not position.is_last_batch:
            return
        state.move(has_stepped=True, is_last_batch=False)
        if not position.has_stepped and position.epoch is not None:
            state.rates.check_used()
            if not position.bn_pass:
                state.follow_weights(position.epoch, after_first_step=True)
        if position.epoch is None or not position.is_last_batch:
            return
        if self._ends_with_average(position.epoch):
            self._carry_average()
        else:
            # Before the model is saved elsewhere: snapshots by steps cannot be taken again.
            self._close_epoch()
            self._save(position.epoch + 1)

    def begin_test(self) -> None:
        """Have validation evaluate the final model, or the average if that is asked for."""
        position = self._state.position
        if position.bn_pass:
            self._finish_bn_pass(position.bn_pass)
        elif position.epoch is not None and (
            self._options.validate_average or self._ends_with_average(position.epoch)
        ):
            self._carry_average()

    def end_epoch(self, epoch: int, logs: dict[str, Any] | None) -> None:
        """End an epoch: take its snapshot, log the learning rate, and save the average."""
        state = self._state
        bn_pass = state.position.bn_pass
        if bn_pass:
            self._finish_bn_pass(bn_pass)
            state.note_final_statistics(bn_pass.has_statistics)
        self._close_epoch()
        if logs is not None:
            for name, rate in state.rates.log_entries().items():
                logs.setdefault(name, 0.0 if bn_pass else rate)
        self._handle_early_stop(epoch)
        saved = self._save(epoch + 1)
        trained = not state.plan.ends_with_bn_pass
        if self._is_last(epoch) and (state.snapshots.average_is_carried or (saved and trained)):
            # No later epoch restores the trained weights, so the average is made final now: what
            # other callbacks, or an optimizer's average, write at the end must not enter it.
            state.end_carrying()
            if state.n_averaged:
                self._final.put()
                state.move(average_is_final=trained)

    def end(self) -> None:
        """Leave the average in the model, and warn of what it has to do without."""
        state = self._state
        epoch, bn_pass = state.position.epoch, state.position.bn_pass
        state.end_carrying()
        state.end_step_snapshots()
        if bn_pass and (self._options.bn_steps or self._final.is_recomputed):
            self._model.stop_training = bool(state.progress.stopped)
        nothing_to_train = epoch is None and self._saved is not None
        if nothing_to_train:  # it was interrupted after its last epoch
            self._start(state.plan.epochs)
        if not state.n_averaged:
            first, not_finite = state.plan.first_snapshot_point, bool(state.progress.not_finite)
            state.warn(messages.no_snapshot(epoch, first, not_finite))
        elif nothing_to_train and self._final.is_in_model:
            state.snapshots.average.weights.copy_to_model()
            state.print(messages.FINAL)
        else:
            self._final.leave()
        state.rates.restore_unused_optimizers()
        if self._saved:
            self._saved.remove()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open. See `SWA.averaged_weights`."""
        snapshots, bn_pass = self._state.snapshots, self._state.position.bn_pass
        lost = snapshots.average_is_lost
        if not self._state.snapshots_so_far or lost:
            first = self._state.plan.first_snapshot_point
            raise RuntimeError(errors.no_average(first, lost))
        # In the BN pass the model has the average already, with other statistics; but not if
        # weights have been written after an exception.
        is_there = bn_pass and bn_pass.in_force and snapshots.average.weights.equals_model
        with contextlib.nullcontext() if is_there else snapshots.average.averaged():
            yield

    # How a run starts, and how it ends

    def _start(self, epoch: int) -> None:
        """Start with an epoch, or after the last if none is left to train."""
        state = self._state
        try:
            if trainable_variables(self._model):
                state.snapshots.prepare()
            start = find_start(epoch, state.plan, state.snapshots, self._saved)
            state.resume(start)
            if state.n_averaged:
                state.print(messages.resuming(state.n_averaged))
            if start.snapshot_due:
                state.take_snapshot(epoch - 1)
            if epoch >= state.plan.epochs:
                return
            if not state.n_averaged:
                state.plan.check_first_epoch(epoch, state.progress.steps)
            if self._options.bn_data is not None and not state.plan.batch_norm:
                state.warn(messages.bn_data_without_effect())
            guess = state.rates.guessed_initial
            for message in warnings_of(start, epoch, self._options.validate_average, guess):
                state.warn(message)
            if self._saved:  # what cannot be saved now could not be saved later
                self._saved.save(epoch, state.plan, state.progress, state.rates, state.snapshots)
        except BaseException:
            if self._saved:
                self._saved.close()
            raise

    # How an epoch ends

    def _close_epoch(self) -> None:
        """Do what is due when an epoch has trained: once, at its validation or at its end."""
        state = self._state
        epoch = state.position.epoch
        assert epoch is not None
        if not state.snapshots.average_is_carried:
            state.note_steps()
        if state.position.is_closed:
            return
        state.move(is_closed=True)
        if state.plan.snapshot_steps is None and state.plan.is_snapshot(epoch):
            if not state.n_averaged:
                state.follow_weights(epoch)
            state.take_snapshot(epoch)
        state.learn_from_counts()

    def _carry_average(self) -> None:
        """Take the epoch's snapshot, and have the model carry the average."""
        self._close_epoch()
        state, snapshots = self._state, self._state.snapshots
        if not state.n_averaged or snapshots.average_is_carried or snapshots.average_is_lost:
            return
        # What saves the model at the end of the epoch saves the average: what training resumes from
        # is to be saved before, and the average in the form that it has after a swap.
        snapshots.average.weights.normalize()
        assert state.position.epoch is not None
        if self._save(state.position.epoch + 1) or self._options.validate_average:
            snapshots.average.carry()
            if self._final.is_recomputed:
                self._final.recompute(for_good=self._ends_with_average(state.position.epoch))

    def _is_last(self, epoch: int) -> bool:
        return self._model.stop_training or epoch + 1 == self._state.plan.epochs

    def _ends_with_average(self, epoch: int) -> bool:
        """Return whether the model is to have the average as soon as this epoch has trained."""
        return not self._state.plan.ends_with_bn_pass and self._is_last(epoch)

    def _handle_early_stop(self, epoch: int) -> None:
        """Have one more epoch run as the BN pass after an early stop."""
        state = self._state
        if state.plan.is_bn_pass(epoch):
            if state.progress.stopped:
                self._model.stop_training = True
        elif self._model.stop_training and state.n_averaged:
            if state.plan.ends_with_bn_pass:
                state.stop_after(epoch)
                self._model.stop_training = False
            elif self._final.is_recomputed and epoch + 1 < state.plan.epochs:
                state.note_stop(epoch)

    def _finish_bn_pass(self, bn_pass: BatchNormPass) -> None:
        bn_pass.finish()
        if self._final.is_recomputed and not self._state.position.has_recomputed:
            self._final.recompute()

    def _begin_bn_pass(self, epoch: int) -> None:
        state = self._state
        state.snapshots.average.copy_to_model()
        state.print(messages.of_epoch(epoch, messages.FINAL))
        state.print(messages.of_epoch(epoch, messages.RESETTING_BATCH_NORM))
        bn_pass = BatchNormPass(
            self._model,
            self._keras_api,
            average=state.snapshots.average.weights,
            step_optimizers=state.rates.optimizers,
            steps=state.plan.steps_per_epoch,
            # With `bn_data` this epoch is there because Keras has begun it.
            bn_steps=1 if self._final.is_recomputed else self._options.bn_steps,
        )
        state.move(bn_pass=bn_pass)
        bn_pass.begin()
        state.print(messages.of_epoch(epoch, messages.RUNNING_BN_PASS))
        state.print(messages.of_epoch(epoch, messages.TRACING_BN_PASS))

    def _save(self, completed: int) -> bool:
        """Save a checkpoint if there is a folder for it; return whether that has worked."""
        if not self._saved:
            return True
        state, saved = self._state, self._saved
        saved.end_epoch()
        try:
            saved.save(completed, state.plan, state.progress, state.rates, state.snapshots)
        except CheckpointError as error:
            # A checkpoint that cannot be written is not worth ending the run for.
            state.warn(messages.not_saved(completed - 1, error))
            return False
        finally:
            if state.snapshots.average_is_carried:  # again, with averaged statistics
                self._final.reapply()
        return True
