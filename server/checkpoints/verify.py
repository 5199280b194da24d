"""Proves that a checkpoint directory is what its manifest says and can be loaded without surprises."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from server.checkpoints.architecture import expected_tensors
from server.checkpoints.documents import read_document
from server.checkpoints.errors import InvalidCheckpoint
from server.checkpoints.manifest import FILE, sha256
from server.checkpoints.shards import read_header, read_through

if TYPE_CHECKING:
    from server.checkpoints.registry import Checkpoint

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Told what is being done ("copying", "verifying"), the bytes that are done, and how many there are."""

WORKERS = min(8, os.cpu_count() or 1)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
KEPT = (
    CONFIG,
    "generation_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What the engine reads when it starts and keeps when weights are replaced."""

SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
NOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.md")
REDIRECTIONS = ("auto_map", "configuration_files", "fast_tokenizer_files")
"""Keys with which transformers finds code, another configuration or another tokenizer than the one that is checked."""

PROVENANCE = ("_name_or_path", "transformers_version")
"""What a configuration says of its origin, and not of the model."""

NAMED = 3
LONGEST_NAME = 120
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def verify(checkpoint: Checkpoint, serving: Path | None, progress: Progress | None = None) -> None:
    """Raises InvalidCheckpoint with every problem that was found. May be called from any thread.

    With `serving`, the directory of the checkpoint in service, also checks that the two differ in weights only. Reads
    every byte once, a shard on each core, in a memory that does not grow with the checkpoint. What `progress` raises
    ends it.
    """
    contents = Contents(checkpoint)
    problems = [*contents.problems, *_differences(contents, serving), *_read_all(contents, progress)]
    if problems:
        raise InvalidCheckpoint(checkpoint.id, problems)


def inspect(checkpoint: Checkpoint, serving: Path | None) -> list[str]:
    """The problems that show without reading the weights: a matter of milliseconds."""
    contents = Contents(checkpoint)
    return [*contents.problems, *_differences(contents, serving)]


class Contents:
    """What a checkpoint directory holds and what is wrong with it. Opens only plain files with names it expects."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.directory = checkpoint.path
        self.manifest = checkpoint.manifest
        self.problems: list[str] = []
        self.files = self._files()
        documents = [name for name in self.files if name.endswith(".json")]
        shards = [name for name in self.files if SHARD.fullmatch(name)]
        self.documents = dict(self._each(documents, read_document))
        self.headers = dict(self._each(shards, read_header))
        self.problems += _redirections(self.documents)
        places = self._places()
        if INDEX not in self.files and shards != [WEIGHTS]:
            self.problems.append(f"without {INDEX} there has to be {WEIGHTS} and no other shard")
        # A shard that cannot be read says nothing of its tensors.
        if self.headers.keys() == {name for name in self.manifest.files if SHARD.fullmatch(name)}:
            self.problems += [*(self._misplaced(places) if places else ()), *self._misfits()]

    def _files(self) -> list[str]:
        listed = self.manifest.files.keys() | {FILE}
        plain: set[str] = set()
        odd: set[str] = set()
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    (plain if entry.is_file(follow_symlinks=False) else odd).add(entry.name)
        except OSError as error:
            self.problems.append(f"it cannot be read: {error}")
            return []
        self.problems += [f"{name!r} is a link or a directory: put the file itself there" for name in sorted(odd)]
        self.problems += [f"{name!r} is missing" for name in sorted(listed - plain - odd)]
        self.problems += [f"{name!r} is not in its manifest" for name in sorted(plain - listed)]
        self.problems += [
            f"{name!r} is nothing that a checkpoint may hold: weights are safetensors, beside {', '.join(KEPT)}"
            for name in sorted(listed | plain)
            if not _is_expected(name)
        ]
        if not plain.intersection(TOKENIZERS):
            self.problems.append("it has no tokenizer")
        return sorted(name for name in plain if _is_expected(name))

    def _each(self, names: list[str], read: Callable[[Path], T]) -> Iterator[tuple[str, T]]:
        for name in names:
            try:
                yield name, read(self.directory / name)
            except (OSError, ValueError) as error:
                self.problems.append(f"{name} cannot be read: {error}")

    def _places(self) -> dict[str, str] | None:
        """Where the index says each tensor is; None where there is no index, or none that says it."""
        if INDEX not in self.documents:
            return None
        places = self.documents[INDEX].get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            self.problems.append(f"{INDEX} has no weight_map of tensor names to file names")
            return None
        strange = {repr(file) for file in places.values() if not SHARD.fullmatch(file)}
        self.problems += _some(f"files in {INDEX} that are no shard's name", strange)
        return places

    def _misplaced(self, places: dict[str, str]) -> Iterator[str]:
        found = {(tensor.name, file) for file, tensors in self.headers.items() for tensor in tensors}
        yield from _some(f"tensors that are not where {INDEX} says", {name for name, _ in places.items() ^ found})

    def _misfits(self) -> Iterator[str]:
        """Tensors that are not those of the configuration, all in the type that the manifest names."""
        found = {tensor.name: tensor for tensors in self.headers.values() for tensor in tensors}
        try:
            expected = expected_tensors(self.documents[CONFIG])
        except KeyError:
            return  # Its absence is a problem of its own.
        except ValueError as error:
            yield f"{CONFIG} is not that of a checkpoint for this service: {error}"
            return
        dtype = DTYPES[self.manifest.dtype]
        yield from _some("missing tensors", expected.keys() - found.keys())
        yield from _some("tensors too many", found.keys() - expected.keys())
        common = expected.keys() & found.keys()
        yield from _some(
            f"tensors of another shape than {CONFIG} gives them",
            [
                f"{name} {list(found[name].shape)} for {list(expected[name])}"
                for name in common
                if found[name].shape != expected[name]
            ],
        )
        yield from _some(f"tensors that are not {dtype}", [name for name in common if found[name].dtype != dtype])


def _is_expected(name: str) -> bool:
    return name in (*KEPT, INDEX, FILE) or bool(SHARD.fullmatch(name) or NOTE.fullmatch(name))


def _some(what: str, names: Collection[str]) -> Iterator[str]:
    """One problem for many of a kind, which names the first few; names can be anything."""
    if names:
        first = [name[:LONGEST_NAME] if name.isprintable() else ascii(name)[:LONGEST_NAME] for name in sorted(names)]
        yield f"{what} ({len(names)}): {', '.join(first[:NAMED])}{', ...' if len(names) > NAMED else ''}"


def _redirections(documents: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name in (CONFIG, "tokenizer_config.json", "generation_config.json"):
        for key in sorted(set(REDIRECTIONS) & set(_keys(documents.get(name)))):
            yield f"{name} has {key!r}, which points at code or at files that are not checked: remove it"


def _keys(value: Any) -> Iterator[str]:
    """Every key at any depth."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            yield from inner
            left.extend(inner.values())
        elif isinstance(inner, list):
            left.extend(inner)


def _differences(contents: Contents, serving: Path | None) -> Iterator[str]:
    if serving is None:
        return
    different = [
        name
        for name in KEPT
        if not _alike(contents.directory / name if name in contents.files else None, serving / name)
    ]
    if different:
        yield (
            f"{', '.join(different)} differ from the checkpoint in service, and only weights can be replaced while it "
            "runs: start new replicas with this checkpoint (bimedix serve --model DIR)"
        )


def _alike(one: Path | None, other: Path) -> bool:
    """Whether both are absent, or say the same."""
    if one is None or not other.is_file():
        return one is None and not other.is_file()
    try:
        return sha256(one) == sha256(other) or (one.suffix == ".json" and _meaning(one) == _meaning(other))
    except (OSError, ValueError, RecursionError):
        return False


def _meaning(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_document(path).items() if key not in PROVENANCE}


def _read_all(contents: Contents, progress: Progress | None) -> list[str]:
    """Hashes every file and looks at every value."""
    listed = contents.manifest.files
    names = [name for name in contents.files if name in listed]
    meter = Meter(sum((contents.directory / name).stat().st_size for name in names), progress)

    def read(name: str) -> list[str]:
        try:
            digest, faulty = read_through(contents.directory / name, contents.headers.get(name, []), meter.advance)
        except (OSError, EOFError) as error:
            return [f"{name} cannot be read: {error}"]
        changed = [] if digest == listed[name] else [f"{name} is not the file that its manifest names: copy it again"]
        return [*changed, *_some(f"tensors with NaN or infinity in {name}", faulty)]

    pool = ThreadPoolExecutor(WORKERS)
    try:
        return [problem for problems in pool.map(read, names) for problem in problems]
    finally:
        # Also when this is interrupted: the workers end at their next piece.
        meter.stopped = True
        pool.shutdown(cancel_futures=True)


class Stopped(Exception):
    """The reading was given up by whoever asked for it."""


class Meter:
    """Adds up what the workers have read."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.progress = progress
        self.done = 0
        self.stopped = False
        self.lock = Lock()

    def advance(self, count: int) -> None:
        if self.stopped:
            raise Stopped
        with self.lock:
            self.done += count
            if self.progress:
                self.progress("verifying", self.done, self.total)
