"""The checkpoints of an average on disk, from which an interrupted run is resumed."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MAX_CHECKPOINTS = 2
_NAME = "swa-epoch-"
_LOCK = "swa.lock"
_READ_ERRORS = (tf.errors.OpError, AssertionError, LookupError, ValueError, OSError)


class CheckpointError(OSError):
    """A folder, or a file in it, cannot be used."""


class Checkpoints:
    """The last two checkpoints of an average, each of the end of an epoch, in a folder.

    Each is a `tf.train.Checkpoint` of the average's buffers, with a record of all else as JSON. Its
    name has the number of completed epochs. TensorFlow writes the index of a checkpoint last, under
    another name, and renames it, so that a checkpoint is complete or absent. It has checksums, and
    is read completely before any of it is used.

    Args:
        folder: The folder, local or of any kind that `tf.io.gfile` supports. It is created if it is
            missing. Several workers must share it.
        writes: Whether this worker writes: the chief. The others only read.
    """

    def __init__(self, folder: str | os.PathLike, writes: bool) -> None:
        self.folder = os.fspath(folder)
        if "://" not in self.folder:
            self.folder = os.path.abspath(self.folder)  # the working directory may change
        self._writes = writes

    @property
    def epochs(self) -> list[int]:
        """Numbers of completed epochs of the checkpoints, in rising order."""
        matches = (re.fullmatch(rf"{_NAME}(\d+)\.index", name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, epoch: int) -> str:
        """Return the path of a checkpoint's files, without their endings."""
        return os.path.join(self.folder, f"{_NAME}{epoch:05d}")

    def open(self) -> None:
        """Create the folder, and lock it until `remove`, or until this process ends.

        Raises:
            CheckpointError: It cannot be written to, or a run of another process uses it.
        """
        if "[" in self.folder:
            raise CheckpointError(
                f"`backup_dir` must not have a '[' in it, which TensorFlow takes for a pattern. "
                f"Received: {self.folder!r}."
            )
        if not self._writes:
            return
        try:
            tf.io.gfile.makedirs(self.folder)
            self._hold()
        except (tf.errors.OpError, OSError) as error:
            raise CheckpointError(
                "`backup_dir` must be a folder that can be written to, and that no other run uses. "
                f"Received: {self.folder!r}: {_reason(error)}."
            ) from error

    def save(self, completed: int, buffers: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write a checkpoint of the end of an epoch, and remove all but the one before it.

        Args:
            completed: Number of completed epochs.
            buffers: Objects for a `tf.train.Checkpoint`.
            record: Values for JSON.

        Raises:
            CheckpointError: It could not be written. Earlier ones are still there.
        """
        if not self._writes:
            return
        try:
            if not self._holds:
                raise OSError("another run of this process has begun to use the folder")
            # A run that was resumed at an earlier epoch may come to this one again.
            self._remove(e for e in self.epochs if e == completed)
            tf.io.gfile.makedirs(self.folder)
            tf.train.Checkpoint(**buffers, record=_Record(record)).write(self.path(completed))
            kept = [e for e in self.epochs if e <= completed][-_MAX_CHECKPOINTS:]
            self._remove(e for e in self.epochs if e not in kept)
            self._remove_remains()
        except (tf.errors.OpError, OSError) as error:
            if self._holds:
                with contextlib.suppress(tf.errors.OpError, OSError):
                    self._remove_remains()
            raise CheckpointError(
                f"`backup_dir`, {self.folder!r}, cannot be written to: {_reason(error)}."
            ) from error

    def newest(
        self, completed: int, configuration: Mapping[str, Any], layout: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        """Find the newest readable checkpoint of no later than an epoch.

        Args:
            completed: Number of completed epochs.
            configuration: What the "configuration" in the record must equal.
            layout: What the "layout" in the record must equal, if it has one.

        Returns:
            The number of epochs that were completed, and the record; None if there is none.

        Raises:
            ValueError: It is of another configuration.
        """
        for saved in reversed([e for e in self.epochs if e <= completed]):
            path = self.path(saved)
            try:
                record = _read(path)
            except _READ_ERRORS as error:
                message = messages.damaged_checkpoint(path, _reason(error))
                warnings.warn(message, SWAWarning, stacklevel=4)
                continue
            _check(record["configuration"], configuration, path)
            if record["layout"]:
                _check(record["layout"], layout, path)
            return saved, record
        return None

    def restore(self, completed: int, buffers: Mapping[str, Any]) -> None:
        """Restore buffers from a checkpoint that was found."""
        status = tf.train.Checkpoint(**buffers).read(self.path(completed))
        status.assert_existing_objects_matched().expect_partial()

    def remove(self) -> None:
        """Remove all checkpoints, and release the folder."""
        if self._holds:
            with contextlib.suppress(tf.errors.OpError, OSError):
                self._remove(self.epochs)
                self._remove_remains()
        self.close()

    def close(self) -> None:
        """Release the folder, and remove it if it is empty."""
        if not self._holds:
            return
        with contextlib.suppress(tf.errors.OpError, OSError):
            with contextlib.suppress(tf.errors.NotFoundError):
                tf.io.gfile.remove(os.path.join(self.folder, _LOCK))
            if not self._names():
                tf.io.gfile.rmtree(self.folder)
        _, file = _LOCKS.pop(self._key)
        if file is not None:
            os.close(file)

    @property
    def _key(self) -> tuple[int, str]:
        # With the process, as a fork does not hold the folder.
        return os.getpid(), self.folder

    @property
    def _holds(self) -> bool:
        holder, _ = _LOCKS.get(self._key, (None, None))
        return holder is self

    def _names(self) -> list[str]:
        try:
            return [name.rstrip("/") for name in tf.io.gfile.listdir(self.folder)]
        except tf.errors.NotFoundError:
            return []

    def _remove(self, epochs: Any) -> None:
        for epoch in epochs:
            # First, as the other files are useless without it.
            tf.io.gfile.remove(self.path(epoch) + ".index")

    def _remove_remains(self) -> None:
        """Remove the files of incomplete checkpoints, which an interrupted write leaves."""
        complete = {os.path.basename(self.path(epoch)) for epoch in self.epochs}
        for name in self._names():
            ours = re.fullmatch(rf"({_NAME}\d+)(_temp|\.index.*|\.data-\d+-of-\d+.*)", name)
            if ours and ours[1] not in complete:
                path = os.path.join(self.folder, name)
                (tf.io.gfile.rmtree if tf.io.gfile.isdir(path) else tf.io.gfile.remove)(path)

    def _hold(self) -> None:
        # Within a process the latest one holds the folder: the next `fit` is to resume from it if
        # an exception has ended one.
        _, file = _LOCKS.get(self._key, (None, None))
        if file is None and fcntl and "://" not in self.folder:
            file = _locked(os.path.join(self.folder, _LOCK))
        _LOCKS[self._key] = self, file


# What holds a folder in this process, and its lock file. That stays open: a process loses its lock
# when it closes any of its descriptors of the file.
_LOCKS: dict[tuple[int, str], tuple[Checkpoints, int | None]] = {}


def _locked(path: str) -> int | None:
    """Open a file and lock it, until it is closed or this process ends; forks do not hold it.

    Returns None if the file system has no locks.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 20).decode() or "?"
        os.close(file)
        if isinstance(error, BlockingIOError | PermissionError):
            raise OSError(f"process {holder} is using it") from error
        return None
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    return file


class _Record(tf.train.experimental.PythonState):
    """Values for JSON, as part of a checkpoint."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.content = content

    def serialize(self) -> str:
        return json.dumps(self.content)

    def deserialize(self, string_value: str) -> None:
        self.content = json.loads(string_value)


def _read(path: str) -> dict[str, Any]:
    """Return the record of a checkpoint, all of which is read, and so checked."""
    reader = tf.train.load_checkpoint(path)
    for name in reader.get_variable_to_shape_map():
        reader.get_tensor(name)
    record = _Record({})
    tf.train.Checkpoint(record=record).read(path).expect_partial()
    return dict(record.content)


def _check(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    for name in [*wanted, *saved]:
        there, here = (values.get(name, "nothing") for values in (saved, wanted))
        if there != here:
            raise ValueError(
                f"A run must be resumed as it began. Received: {name}={here!r}, but {name}="
                f"{there!r} in {path!r}. Use what the run began with, or another `backup_dir`."
            )


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or getattr(error, "strerror", None) or error)
    # TensorFlow adds the operation to the system's message.
    return re.sub(r"\{\{.*?\}\} *| *\[Op:.*?\]", "", text).strip().rstrip(".")
