"""States of an average on disk, with which a run that was killed goes on."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KEPT = 2
_NAME = "swa-epoch-"
_LOCK = "swa.lock"
_DAMAGE = (tf.errors.OpError, AssertionError, LookupError, ValueError, OSError)


class BackupError(OSError):
    """A folder, or a file in it, cannot be used."""


class Backup:
    """The last two states of an average, each of the end of an epoch, in a folder.

    A state is a `tf.train.Checkpoint` of the average's buffers, and a record: whatever else there
    is to know, as JSON. Its name has the number of epochs that were over. TensorFlow writes the
    index of a checkpoint last, under another name, and renames it: a state is there as a whole, or
    not at all. It has checksums, and is read as a whole before any of it is used.

    Args:
        folder: Where it is kept; local, or anything that `tf.io.gfile` knows. It is made if it is
            missing. Several workers must share it.
        writes: Whether this worker is the one that writes: the chief. The others only read.
    """

    def __init__(self, folder: str | os.PathLike, writes: bool) -> None:
        self.folder = os.fspath(folder)
        if "://" not in self.folder:
            self.folder = os.path.abspath(self.folder)  # the program may change its directory
        self._writes = writes

    @property
    def epochs(self) -> list[int]:
        """Numbers of epochs after which there is a state, in rising order."""
        matches = (re.fullmatch(rf"{_NAME}(\d+)\.index", name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, epoch: int) -> str:
        """Return the path of a state's files, without their endings."""
        return os.path.join(self.folder, f"{_NAME}{epoch:05d}")

    def open(self) -> None:
        """Make the folder, and hold it until `remove`, or until this process ends.

        Raises:
            BackupError: It cannot be written to, or a run of another process uses it.
        """
        if "[" in self.folder:
            raise BackupError(
                f"`backup_dir` must not have a '[' in it, which TensorFlow takes for a pattern. "
                f"Received: {self.folder!r}."
            )
        if not self._writes:
            return
        try:
            tf.io.gfile.makedirs(self.folder)
            self._hold()
        except (tf.errors.OpError, OSError) as error:
            raise BackupError(
                "`backup_dir` must be a folder that can be written to, and that no other run uses. "
                f"Received: {self.folder!r}: {_reason(error)}."
            ) from error

    def save(self, epoch: int, buffers: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write the state at the end of an epoch, and remove those but the one before it.

        Args:
            epoch: Number of epochs that are over.
            buffers: What a `tf.train.Checkpoint` takes.
            record: What JSON takes.

        Raises:
            BackupError: It could not be written. Earlier states are still there.
        """
        if not self._writes:
            return
        try:
            if not self._holds:
                raise OSError("another run of this process has begun to use the folder")
            # A run that went on from an earlier epoch comes to this one again.
            self._remove(e for e in self.epochs if e == epoch)
            tf.io.gfile.makedirs(self.folder)
            tf.train.Checkpoint(**buffers, record=_Record(record)).write(self.path(epoch))
            kept = [e for e in self.epochs if e <= epoch][-_KEPT:]
            self._remove(e for e in self.epochs if e not in kept)
            self._remove_remains()
        except (tf.errors.OpError, OSError) as error:
            if self._holds:
                with contextlib.suppress(tf.errors.OpError, OSError):
                    self._remove_remains()
            raise BackupError(
                f"`backup_dir`, {self.folder!r}, cannot be written to: {_reason(error)}."
            ) from error

    def newest(
        self, epoch: int, configuration: Mapping[str, Any], layout: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        """Find the newest whole state of what was before an epoch.

        Args:
            epoch: Number of epochs that are over.
            configuration: What the "configuration" in the record must be equal to.
            layout: What the "layout" in the record must be equal to, if it has one.

        Returns:
            The number of epochs that were over, and the record; None if there is no such state.

        Raises:
            ValueError: The state is of another configuration.
        """
        for saved in reversed([e for e in self.epochs if e <= epoch]):
            path = self.path(saved)
            try:
                record = _read(path)
            except _DAMAGE as error:
                warnings.warn(
                    f"A state in `backup_dir` cannot be used: {path!r} is damaged "
                    f"({_reason(error)}).",
                    stacklevel=4,
                )
                continue
            _check(record["configuration"], configuration, path)
            if record["layout"]:
                _check(record["layout"], layout, path)
            return saved, record
        return None

    def restore(self, epoch: int, buffers: Mapping[str, Any]) -> None:
        """Give buffers the values of a state that was found."""
        status = tf.train.Checkpoint(**buffers).read(self.path(epoch))
        status.assert_existing_objects_matched().expect_partial()

    def remove(self) -> None:
        """Remove all states, and let go of the folder."""
        if self._holds:
            with contextlib.suppress(tf.errors.OpError, OSError):
                self._remove(self.epochs)
                self._remove_remains()
        self.close()

    def close(self) -> None:
        """Let go of the folder, and remove it if nothing is in it."""
        if not self._holds:
            return
        with contextlib.suppress(tf.errors.OpError, OSError):
            with contextlib.suppress(tf.errors.NotFoundError):
                tf.io.gfile.remove(os.path.join(self.folder, _LOCK))
            if not self._names():
                tf.io.gfile.rmtree(self.folder)
        _, file = _HELD.pop(self._key)
        if file is not None:
            os.close(file)

    @property
    def _key(self) -> tuple[int, str]:
        # With the process: what it forks holds nothing.
        return os.getpid(), self.folder

    @property
    def _holds(self) -> bool:
        holder, _ = _HELD.get(self._key, (None, None))
        return holder is self

    def _names(self) -> list[str]:
        try:
            return [name.rstrip("/") for name in tf.io.gfile.listdir(self.folder)]
        except tf.errors.NotFoundError:
            return []

    def _remove(self, epochs: Any) -> None:
        for epoch in epochs:
            # What the others mean without it nobody knows: it is first to go.
            tf.io.gfile.remove(self.path(epoch) + ".index")

    def _remove_remains(self) -> None:
        """Remove the files of states that are not there as a whole, such as a kill leaves."""
        whole = {os.path.basename(self.path(epoch)) for epoch in self.epochs}
        for name in self._names():
            ours = re.fullmatch(rf"({_NAME}\d+)(_temp|\.index.*|\.data-\d+-of-\d+.*)", name)
            if ours and ours[1] not in whole:
                path = os.path.join(self.folder, name)
                (tf.io.gfile.rmtree if tf.io.gfile.isdir(path) else tf.io.gfile.remove)(path)

    def _hold(self) -> None:
        # Within a process the last one to come holds the folder: an exception that ended a `fit`
        # has let nobody know, and the next `fit` is to go on from there.
        _, file = _HELD.get(self._key, (None, None))
        if file is None and fcntl and "://" not in self.folder:
            file = _locked(os.path.join(self.folder, _LOCK))
        _HELD[self._key] = self, file


# Who holds a folder in this process, and its lock file, which stays open: whichever of the files
# that a process has opened is closed, its lock is gone.
_HELD: dict[tuple[int, str], tuple[Backup, int | None]] = {}


def _locked(path: str) -> int | None:
    """Open a file and lock it, until it is closed or this process ends, whatever it has forked.

    Returns None where the file system knows no locks.
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
    """What JSON takes, as part of a checkpoint."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.content = content

    def serialize(self) -> str:
        return json.dumps(self.content)

    def deserialize(self, string_value: str) -> None:
        self.content = json.loads(string_value)


def _read(path: str) -> dict[str, Any]:
    """Return the record of a state that is whole; whatever is read is checked."""
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
                f"A run must go on as it began. Received: {name}={here!r}, but {name}={there!r} in "
                f"{path!r}. Use what the run began with, or another `backup_dir`."
            )


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or getattr(error, "strerror", None) or error)
    # TensorFlow puts the operation around what the system says.
    return re.sub(r"\{\{.*?\}\} *| *\[Op:.*?\]", "", text).strip().rstrip(".")
