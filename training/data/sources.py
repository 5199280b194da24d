"""Reads training records from JSONL, Parquet, a folder of either, or a dataset id of the Hugging Face Hub; streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from training.errors import Refused
from training.records import Raw

SUFFIXES = (".jsonl", ".parquet")


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix not in SUFFIXES


def files(source: str) -> list[Path]:
    """The files behind a local source, in name order; empty for a Hub id. Raises Refused when it can't be read."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise Refused(f"{source} holds no {' or '.join(SUFFIXES)} file")
        return found
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise Refused(f"{source} is neither {' nor '.join(SUFFIXES)}")
        return [path]
    if not is_hub_id(source):
        raise Refused(f"{source} does not exist")
    return []


def read(sources: Iterable[str]) -> Iterator[Raw]:
    """Every entry of every source, with the place it was read from. Never raises for a bad entry."""
    for source in sources:
        paths = files(source)
        for path in paths:
            yield from _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
        if not paths:
            yield from _hub(source)


def _jsonl(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield Raw(place, json.loads(line))
            except ValueError as error:
                text = line[:200].decode("utf-8", "replace")
                yield Raw(place, text, f"not JSON: {getattr(error, 'msg', 'not UTF-8')}")


def _parquet(path: Path) -> Iterator[Raw]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(path).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield Raw(f"{path}:{number}", row)


def _hub(source: str) -> Iterator[Raw]:
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(source, split="train", streaming=True), 1):
        yield Raw(f"{source}:{number}", row)
