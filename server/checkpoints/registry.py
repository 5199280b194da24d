"""A directory of immutable checkpoints, each a directory named by its id, with its manifest."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from server.checkpoints.errors import CheckpointError, InvalidCheckpoint, UnknownCheckpoint
from server.checkpoints.manifest import FILE, CheckpointId, Manifest, read_manifest
from server.checkpoints.verify import Progress, inspect, verify

INCOMING = ".incoming-"
REMOVED = ".removed"
LOCK = ".lock"
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory and what its manifest says. Reading one proves nothing about its weights."""

    id: str
    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(self.path))


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in any directory, under the id of its manifest. Raises InvalidCheckpoint without a manifest."""
    try:
        # Never opened unless it is a plain file: a link leads anywhere, and a pipe blocks.
        manifest = None if _odd(directory / FILE) else read_manifest(directory)
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(directory.name, [f"its manifest cannot be read: {error}"]) from None
    if manifest is None:
        raise InvalidCheckpoint(
            directory.name, [f"{directory} has no manifest {FILE}; `bimedix-train merge` writes one"]
        )
    return Checkpoint(manifest.id, directory, manifest)


def _odd(path: Path) -> bool:
    """Whether something other than a plain file is there."""
    return path.is_symlink() or (path.exists() and not path.is_file())


class Registry:
    """The checkpoints in `root`. Several processes, and several machines that share `root`, may use it at once.

    Everything in `root` that starts with a dot belongs to the registry itself. Reading needs neither a lock nor the
    right to write; adding and removing take turns, and need a file system that renames directories atomically.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def ids(self) -> list[str]:
        """Every name in `root` that could be a checkpoint's, in order, whether or not it can be read."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if _is_id(entry.name) and (entry.is_dir(follow_symlinks=False) or entry.is_symlink())
                )
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint registry at {self.root}: create the directory") from None
        except OSError as error:
            raise CheckpointError(f"the checkpoint registry {self.root} cannot be read: {error.strerror}") from None

    def list(self) -> list[Checkpoint]:
        """The checkpoints whose manifests can be read, oldest first."""
        found = []
        for id in self.ids():
            try:
                found.append(self.get(id))
            except CheckpointError:
                continue  # `bimedix checkpoints list` names these, from ids().
        return sorted(found, key=lambda checkpoint: (checkpoint.manifest.created, checkpoint.id))

    def get(self, id: str) -> Checkpoint:
        """Raises UnknownCheckpoint, or InvalidCheckpoint when what is there has no manifest of that id."""
        path = self.root / _checked(id)
        if path.is_symlink():
            raise InvalidCheckpoint(id, [f"{path} is a link: checkpoints are directories of their own"])
        if not path.is_dir():
            raise UnknownCheckpoint(f"there is no checkpoint {id} in {self.root}")
        checkpoint = read_checkpoint(path)
        if checkpoint.id != id:
            raise InvalidCheckpoint(id, [f"the manifest in {path} is that of {checkpoint.id}"])
        return checkpoint

    def add(self, source: Path, progress: Progress | None = None) -> Checkpoint:
        """Copies the checkpoint directory `source` into the registry, verified. `source` is only read.

        Adding what is there already does nothing. Raises InvalidCheckpoint, and CheckpointError when the id stands, or
        stood, for other content, or the copy cannot be written. Whatever is raised, nothing half-written is left.
        """
        given = read_checkpoint(source)
        with self._locked(progress):
            if self._is_there(given):
                return self.get(given.id)
            problems = inspect(given, None)
            if problems:
                raise InvalidCheckpoint(given.id, problems)
            return self._take(lambda hidden: _copy(given, hidden / given.id, progress), progress)

    def build(self, make: Callable[[Path], Path], progress: Progress | None = None) -> Checkpoint:
        """As `add`, with a checkpoint that `make` writes to a new directory in the one it is given, and returns."""
        with self._locked(progress):
            return self._take(make, progress)

    def remove(self, id: str, keep: set[str]) -> None:
        """Deletes a checkpoint for good, readable or not. Its name stays bound to its content.

        Raises UnknownCheckpoint, and CheckpointError when `id` is one of `keep`: the active one and the previous.
        """
        with self._locked(None):
            path = self.root / _checked(id)
            if id in keep:
                raise CheckpointError(f"checkpoint {id} is active or the one before it: activate another first")
            if path.is_symlink() or not path.is_dir():
                raise UnknownCheckpoint(f"there is no checkpoint {id} in {self.root}")
            self._remember(path)
            with self._incoming() as hidden:
                path.rename(hidden / id)
                _sync(self.root)

    def _take(self, make: Callable[[Path], Path], progress: Progress | None) -> Checkpoint:
        """What `make` writes, verified and then moved to its id in one step."""
        with self._incoming() as hidden:
            try:
                folder = make(hidden)
                made = read_checkpoint(folder)
                if self._is_there(made):
                    return self.get(made.id)
                for path in folder.iterdir():
                    path.chmod(0o444)
                    _sync(path)
                _sync(folder)
                verify(made, None, progress)
                folder.rename(self.root / made.id)
                _sync(self.root)
            except OSError as error:
                raise CheckpointError(f"the checkpoint cannot be written to {self.root}: {error}") from error
        return self.get(made.id)

    def _is_there(self, given: Checkpoint) -> bool:
        """Raises CheckpointError when the id stands, or stood, for other content."""
        for folder in (self.root / given.id, self.root / REMOVED / given.id):
            if folder.exists() and not _same(read_checkpoint(folder).manifest, given.manifest):
                raise CheckpointError(
                    f"the id {given.id} stands for other content: ids are never reused, so give this checkpoint "
                    "another (`bimedix-train merge --id`)"
                )
        return (self.root / given.id).exists()

    def _remember(self, path: Path) -> None:
        """Keeps the manifest of what is about to be removed. One that cannot be read binds no name."""
        try:
            read_checkpoint(path)
        except InvalidCheckpoint:
            return
        kept = self.root / REMOVED / path.name
        if kept.exists():
            return
        kept.parent.mkdir(exist_ok=True)
        with self._incoming() as hidden:
            shutil.copyfile(path / FILE, hidden / FILE)
            _sync(hidden / FILE)
            hidden.chmod(0o755)
            hidden.rename(kept)
            _sync(kept.parent)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A hidden directory, on the registry's own file system, that is gone afterwards."""
        hidden = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.root))
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def _locked(self, progress: Progress | None) -> Iterator[None]:
        """Waits for whoever else adds or removes, then clears what one that was killed has left."""
        self.ids()
        try:
            lock = (self.root / LOCK).open("a")
        except OSError as error:
            raise CheckpointError(f"the checkpoint registry {self.root} cannot be changed: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    progress("waiting for another change to the registry", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.root.glob(f"{INCOMING}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield


def _is_id(name: str) -> bool:
    try:
        TypeAdapter(CheckpointId).validate_python(name)
    except ValidationError:
        return False
    return True


def _checked(id: str) -> str:
    if not _is_id(id):
        raise UnknownCheckpoint(f"{id!r} is no checkpoint id: letters, digits, '.', '_' and '-', at most 100")
    return id


def _same(one: Manifest, other: Manifest) -> bool:
    """Merging the same adapter again gives the same content at another time."""
    return one.model_copy(update={"created": other.created}) == other


def _copy(checkpoint: Checkpoint, folder: Path, progress: Progress | None) -> Path:
    """Raises CheckpointError when there is no room, and OSError."""
    total, done = checkpoint.size, 0
    free = shutil.disk_usage(folder.parent).free
    if total > free:
        raise CheckpointError(f"{checkpoint.id} takes {total:,} bytes and {folder.parent.parent} has {free:,} left")
    folder.mkdir()
    for name in (FILE, *checkpoint.manifest.files):
        # O_NOFOLLOW: it was a plain file when it was inspected.
        reading = os.open(checkpoint.path / name, os.O_RDONLY | os.O_NOFOLLOW)
        writing = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with open(reading, "rb", buffering=0) as source, open(writing, "wb") as target:
            while piece := source.read(COPY_BYTES):
                target.write(piece)
                done += len(piece)
                if progress:
                    progress("copying", done, total)
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
