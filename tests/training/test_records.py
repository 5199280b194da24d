from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import records, write_lines
from training.data import sources
from training.errors import Refused
from training.records import Raw, Record, Rejects, TooManyRejected, parse, write


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


GOOD = turns(("human", " What is anaemia? "), ("gpt", "Too little haemoglobin."))


def accept(record: Record) -> None:
    """Finds nothing wrong."""


def test_a_record_becomes_chat_messages() -> None:
    system = turns(("system", "Be brief."), ("human", "Hi"), ("AI", "Hello"))
    assert parse(Raw("a:1", GOOD)).messages == [
        {"role": "user", "content": "What is anaemia?"},
        {"role": "assistant", "content": "Too little haemoglobin."},
    ]
    assert [message["role"] for message in parse(Raw("a:1", system)).messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "valid dictionary"),
        ({"messages": []}, "conversations: Field required"),
        (turns(("human", "Hi")), "at least 2"),
        (turns(("human", "Hi"), ("human", "Hi")), "turn 2 is by user"),
        (turns(("gpt", "Hi"), ("human", "Hi")), "turn 1 is by assistant"),
        (turns(("human", "Hi"), ("gpt", "Hi"), ("human", "Bye")), "the last turn is not the assistant's"),
        (turns(("human", "Hi"), ("gpt", "  ")), "empty turn"),
        (turns(("human", 7), ("gpt", "Hi")), "valid string"),
        (turns(("doctor", "Hi"), ("gpt", "Hi")), "'system', 'user' or 'assistant'"),
        (turns(("human", "Hi"), ("system", "Hi")), "turn 2 is by system"),
    ],
)
def test_a_bad_record_is_refused_with_the_reason(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(Raw("a:1", value))


def test_bad_records_are_counted_and_written_with_their_place(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), "{not json", "", json.dumps(turns(("human", "Hi"))), json.dumps(GOOD)]
    source = tmp_path / "chats.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    rejects = Rejects(tmp_path / "rejected.jsonl", allowed=0.5)
    assert len(list(rejects.filter(sources.read([str(source)]), accept))) == 2
    written = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in written] == [f"{source}:2", f"{source}:4"]
    assert written[0]["reason"].startswith("not JSON")
    assert (rejects.seen, rejects.count) == (4, 2)


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    bad = [Raw(f"a:{number}", {}) for number in range(3)]
    rejects = Rejects(tmp_path / "rejected.jsonl", allowed=0.1)
    with pytest.raises(TooManyRejected, match="3 of 4 records are bad"):
        list(rejects.filter([Raw("a:0", GOOD), *bad], accept))


def test_many_bad_records_stop_the_run_before_its_end(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejected.jsonl", allowed=0.1)
    endless = (Raw(f"a:{number}", {}) for number in range(10_000_000))
    with pytest.raises(TooManyRejected):
        list(rejects.filter(endless, accept))
    assert rejects.seen == 1000


def test_no_record_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no record"):
        list(Rejects(tmp_path / "rejected.jsonl", allowed=0.1).filter([], accept))


def test_jsonl_parquet_and_folders_hold_the_same_records(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    write_lines(folder / "a.jsonl", records(5))
    parquet.write_table(pa.Table.from_pylist(records(5)), folder / "b.parquet")
    read = list(sources.read([str(tmp_path / "folder")]))
    assert [parse(raw) for raw in read[:5]] == [parse(raw) for raw in read[5:]]
    assert read[9].place.endswith("b.parquet:5")


@pytest.mark.parametrize("source", ["missing.jsonl", "/no/such/folder", "./data/bimed"])
def test_a_missing_source_is_refused(source: str) -> None:
    with pytest.raises(Refused, match="does not exist"):
        sources.files(source)


def test_an_empty_folder_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no"):
        sources.files(str(tmp_path))
    (tmp_path / "a.csv").touch()
    with pytest.raises(Refused, match="neither"):
        sources.files(str(tmp_path / "a.csv"))


def test_written_records_are_read_again(tmp_path: Path) -> None:
    assert write(tmp_path / "a.jsonl", records(3)) == 3
    assert [raw.value for raw in sources.read([str(tmp_path / "a.jsonl")])] == records(3)
