from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.checkpoints.errors import CheckpointError, InvalidCheckpoint, UnknownCheckpoint
from server.checkpoints.manifest import FILE, sha256
from server.checkpoints.registry import Registry
from server.checkpoints.verify import Progress
from tests.server.checkpoints.small import SHARD, change, make_checkpoint, sign

PATIENCE = 200
"""Seconds after which something that has to happen is taken not to."""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "registry").mkdir()
    return Registry(tmp_path / "registry")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "small")


def visible(registry: Registry) -> list[str]:
    """What is in the registry's directory but for its lock."""
    return sorted(path.name for path in registry.root.iterdir() if path.name != ".lock")


def content(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir()}


def instead(path: Path, make: Callable[[], None]) -> None:
    path.unlink()
    make()


def test_added_checkpoints_are_listed_and_found(registry: Registry, tmp_path: Path) -> None:
    assert registry.list() == []
    for number in (2, 1):
        source = make_checkpoint(tmp_path / f"any-name-{number}", f"small-{number}", seed=number)
        change(source / FILE, created=f"2026-01-0{number}T00:00:00+00:00")
        added = registry.add(source)
        assert (added.id, added.path) == (f"small-{number}", registry.root / f"small-{number}")
        assert content(added.path) == content(source)
        assert registry.get(added.id) == added
    assert [checkpoint.id for checkpoint in registry.list()] == ["small-1", "small-2"]
    assert visible(registry) == ["small-1", "small-2"]


def test_added_files_are_not_meant_to_be_written_to(registry: Registry, small: Path) -> None:
    added = registry.add(small)
    assert {path.stat().st_mode & 0o777 for path in added.path.iterdir()} == {0o444}
    assert (small / SHARD).stat().st_mode & 0o200, "the source is left as it was"


@pytest.mark.parametrize(
    "id", ["", ".", "..", "../small", "/etc", "a/b", ".lock", ".removed", "a\n", "a\x00", "ا", "x" * 101, "~", "-x"]
)
def test_an_id_is_checked_before_it_is_a_path(registry: Registry, id: str) -> None:
    for use in (registry.get, lambda id: registry.remove(id, set())):
        with pytest.raises(UnknownCheckpoint, match="no checkpoint id"):
            use(id)


def test_what_is_not_there(registry: Registry) -> None:
    with pytest.raises(UnknownCheckpoint, match="there is no checkpoint small-1"):
        registry.get("small-1")
    with pytest.raises(UnknownCheckpoint, match="there is no checkpoint small-1"):
        registry.remove("small-1", set())
    with pytest.raises(CheckpointError, match="create the directory"):
        Registry(registry.root / "nowhere").list()


def test_a_directory_under_another_name_than_its_id(registry: Registry, small: Path) -> None:
    small.rename(registry.root / "renamed")
    with pytest.raises(InvalidCheckpoint, match=r"the manifest in .*/renamed is that of small-1"):
        registry.get("renamed")
    assert (registry.list(), registry.ids()) == ([], ["renamed"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest.unlink(),
        lambda manifest: manifest.write_text("{"),
        lambda manifest: manifest.write_bytes(b'"\xff"'),
        lambda manifest: manifest.write_text('{"id": "small-1"}'),
        lambda manifest: change(manifest, surprise=True),
        lambda manifest: change(manifest, id="../small-1"),
        lambda manifest: change(manifest, created="2026-01-01T00:00:00"),
        lambda manifest: instead(manifest, lambda: manifest.symlink_to("/dev/zero")),
        lambda manifest: instead(manifest, lambda: os.mkfifo(manifest)),
        lambda manifest: instead(manifest, manifest.mkdir),
    ],
)
def test_a_manifest_that_cannot_be_read(registry: Registry, small: Path, spoil: Callable[[Path], object]) -> None:
    """It is refused from outside; inside, the others are still found, and it can be removed."""
    added = registry.add(small)
    spoil(small / FILE)
    with pytest.raises(InvalidCheckpoint, match="manifest"):
        registry.add(small)
    registry.add(make_checkpoint(small.parent / "other", "small-2", seed=2))
    (added.path / FILE).chmod(0o644)
    spoil(added.path / FILE)
    with pytest.raises(InvalidCheckpoint, match="manifest"):
        registry.get("small-1")
    assert [checkpoint.id for checkpoint in registry.list()] == ["small-2"]
    registry.remove("small-1", set())
    assert visible(registry) == ["small-2"]


def test_a_link_is_no_checkpoint(registry: Registry, small: Path) -> None:
    (registry.root / "small-1").symlink_to(small)
    with pytest.raises(InvalidCheckpoint, match="is a link"):
        registry.get("small-1")
    with pytest.raises(UnknownCheckpoint):
        registry.remove("small-1", set())
    assert (small / SHARD).exists()


def test_what_is_not_sound_stays_out(registry: Registry, small: Path) -> None:
    shard = bytearray((small / SHARD).read_bytes())
    shard[-1] ^= 1
    (small / SHARD).write_bytes(shard)
    with pytest.raises(InvalidCheckpoint, match="is not the file that its manifest names"):
        registry.add(small)
    assert visible(registry) == []


def test_what_shows_at_once_is_refused_before_it_is_copied(registry: Registry, small: Path) -> None:
    (small / "model.py").write_text("")
    steps: list[str] = []
    with pytest.raises(InvalidCheckpoint, match=r"model\.py"):
        registry.add(small, lambda step, done, total: steps.append(step))
    assert steps == []


# Names and their content.


def test_adding_again_changes_nothing(registry: Registry, small: Path) -> None:
    added = registry.add(small)
    before = {path: path.stat() for path in added.path.iterdir()}
    assert registry.add(small) == added
    change(small / FILE, created="2030-01-01T00:00:00+00:00")
    assert registry.add(small) == added, "merged again, at another time"
    assert {path: path.stat() for path in added.path.iterdir()} == before


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("what", ["weights", "directives"])
def test_a_name_is_never_reused(registry: Registry, small: Path, tmp_path: Path, removed: bool, what: str) -> None:
    added = registry.add(small)
    held = content(added.path)
    if removed:
        registry.remove("small-1", set())
    other = make_checkpoint(tmp_path / "other", seed=2 if what == "weights" else 1)
    if what == "directives":
        change(other / FILE, directives={"ar": "أجب بالعربية."})
    with pytest.raises(CheckpointError, match="stands for other content: ids are never reused"):
        registry.add(other)
    with pytest.raises(CheckpointError, match="stands for other content"):
        registry.build(lambda parent: make_checkpoint(parent / "made", seed=3))
    assert content(registry.add(small).path) == held, "its own content may come back"


def test_the_active_checkpoint_and_the_one_before_stay(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        registry.add(make_checkpoint(tmp_path / str(number), f"small-{number}", seed=number))
    for id in ("small-2", "small-3"):
        with pytest.raises(CheckpointError, match=f"{id} is active or the one before it"):
            registry.remove(id, {"small-2", "small-3"})
    registry.remove("small-1", {"small-2", "small-3"})
    assert [checkpoint.id for checkpoint in registry.list()] == ["small-2", "small-3"]


# Faults on the way.


def run_add(source: Path, registry: Registry, before: str = "") -> subprocess.Popen[str]:
    """`bimedix checkpoints add` in a process of its own, after the lines `before`."""
    code = f"{before}\nfrom server.cli import main\nmain()"
    command = [sys.executable, "-c", code, "checkpoints", "add", str(source), "--checkpoints", str(registry.root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("created", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_manifest_may_be_of_any_time(registry: Registry, small: Path, created: str) -> None:
    change(small / FILE, created=created)
    assert int(registry.add(small).manifest.created.timestamp())


def test_a_full_disk(registry: Registry, small: Path) -> None:
    """A limit on the size of files ends the copying of the shard as a full disk does: after some of it was written."""
    limit = (small / SHARD).stat().st_size // 2
    (small / "tokenizer.json").write_text("{}")
    process = run_add(
        sign(small), registry, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)"
    )
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1, said
    assert f"the checkpoint cannot be written to {registry.root}: [Errno 27] File too large" in said
    assert "Traceback" not in said
    assert visible(registry) == []
    assert registry.add(small).id == "small-1"


def test_a_disk_with_too_little_room(registry: Registry, small: Path) -> None:
    """Nothing is written when the copy cannot fit: here for a sparse file larger than what is free."""
    size = os.statvfs(registry.root).f_bavail * os.statvfs(registry.root).f_frsize
    (small / "README.md").touch()
    sign(small)
    os.truncate(small / "README.md", size + 1)
    with pytest.raises(CheckpointError, match=r"small-1 takes [\d,]+ bytes and .* has [\d,]+ left"):
        registry.add(small)
    assert visible(registry) == []


KILLED = """
import os, sys, time
from pathlib import Path
from server.checkpoints.registry import Registry

def progress(step, done, total):
    if step == sys.argv[3]:
        print(step, flush=True)
        time.sleep(600)

Registry(Path(sys.argv[2])).add(Path(sys.argv[1]), progress)
"""


@pytest.mark.parametrize("step", ["copying", "verifying"])
def test_kill_9_leaves_nothing_that_counts(registry: Registry, small: Path, tmp_path: Path, step: str) -> None:
    registry.add(make_checkpoint(tmp_path / "other", "small-2", seed=2))
    command = [sys.executable, "-c", KILLED, str(small), str(registry.root), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == step
        process.send_signal(signal.SIGKILL)
    left = visible(registry)
    assert (len(left), left[0][:10], left[1]) == (2, ".incoming-", "small-2")
    assert [checkpoint.id for checkpoint in registry.list()] == ["small-2"]
    with pytest.raises(UnknownCheckpoint):
        registry.get(left[0])
    registry.add(small)
    assert visible(registry) == ["small-1", "small-2"]


def test_an_interrupted_removal_is_finished(registry: Registry, small: Path) -> None:
    """Killed after the rename, it leaves what the next change clears."""
    added = registry.add(small)
    (registry.root / ".incoming-killed").mkdir()
    added.path.rename(registry.root / ".incoming-killed" / "small-1")
    assert registry.list() == []
    registry.add(make_checkpoint(small.parent / "other", "small-2", seed=2))
    assert visible(registry) == ["small-2"]


class Turns:
    """The first to copy stops there until another waits."""

    def __init__(self) -> None:
        self.copying = threading.Event()
        self.waiting = threading.Event()

    def first(self, step: str, done: int, total: int) -> None:
        if step == "copying":
            self.copying.set()
            assert self.waiting.wait(PATIENCE)

    def second(self, step: str, done: int, total: int) -> None:
        if step.startswith("waiting"):
            self.waiting.set()


@pytest.mark.parametrize("same", [True, False])
def test_two_adds_at_once_take_turns(registry: Registry, small: Path, tmp_path: Path, same: bool) -> None:
    turns = Turns()
    outcomes: dict[str, object] = {}

    def add(who: str, source: Path, progress: Progress) -> None:
        try:
            outcomes[who] = registry.add(source, progress)
        except CheckpointError as error:
            outcomes[who] = str(error)

    other = small if same else make_checkpoint(tmp_path / "other", seed=2)
    one = threading.Thread(target=add, args=("first", small, turns.first))
    one.start()
    assert turns.copying.wait(PATIENCE)
    add("second", other, turns.second)
    one.join(PATIENCE)
    assert outcomes["first"] == registry.get("small-1")
    assert (outcomes["second"] == outcomes["first"]) is same
    assert same or "stands for other content" in str(outcomes["second"])
    assert content(registry.get("small-1").path) == content(small)


def test_two_processes_add_at_once(registry: Registry, tmp_path: Path) -> None:
    sources = [make_checkpoint(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    processes = [run_add(source, registry) for source in sources]
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], said
    winner = next(source for source, process in zip(sources, processes, strict=True) if process.returncode == 0)
    assert content(registry.get("small-1").path) == content(winner)
    assert visible(registry) == ["small-1"]


def test_an_exception_of_the_caller_leaves_nothing(registry: Registry, small: Path) -> None:
    def progress(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.add(small, progress)
    assert visible(registry) == []
