"""Records to rows of token ids: rendered with the Vicuna template, labels on the assistant's turns, packed."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from training.data import sources
from training.errors import Refused
from training.recipe import Recipe
from training.records import Raw, Record, Rejects

IGNORED = -100
TEMPLATE = Path(__file__).parent / "vicuna_v1.1.jinja"
COLUMNS = ("input_ids", "labels", "seq_lengths")
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Row:
    """One record in tokens. `labels` repeats `input_ids` where the loss counts and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def vicuna_tokenizer(base: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer with this project's chat template. Mixtral has no padding token: `<unk>` stands in.

    Raises Refused when there is none, or none that Vicuna can be written with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base), revision=revision)
    except (OSError, ValueError) as error:
        raise Refused(f"base: {base}: {' '.join(str(error).split())}") from None
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id or tokenizer.bos_token_id is None:
        raise Refused("the tokenizer needs a beginning-of-sequence token and a padding token that is not </s>")
    return tokenizer


class Renderer:
    """Renders records, and proves of each that exactly its replies and their ends of sequence are trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cut = 0

    def __call__(self, record: Record) -> Row:
        """Raises ValueError when the record would not train what it says."""
        for message in record.messages:
            for token in self.tokenizer.all_special_tokens:
                if token in message["content"]:
                    raise ValueError(f"the text holds the special token {token}")
        encoded: Any = self.tokenizer.apply_chat_template(
            [dict(message) for message in record.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        self._prove(record, ids, mask)
        if len(ids) > self.max_length:
            self.cut += 1
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            if not any(mask):
                raise ValueError(f"no reply begins within {self.max_length} tokens")
        return Row(ids, [token if spoken else IGNORED for token, spoken in zip(ids, mask, strict=True)])

    def _prove(self, record: Record, ids: list[int], mask: list[int]) -> None:
        replies = [message["content"] for message in record.messages if message["role"] == "assistant"]
        spans = list(_spans(ids, mask))
        if len(spans) != len(replies):
            raise ValueError(f"the template marks {len(spans)} replies of {len(replies)}")
        for span, reply in zip(spans, replies, strict=True):
            if span[-1] != self.tokenizer.eos_token_id:
                raise ValueError("a reply's end of sequence is not trained on")
            if not self._same(span[:-1], reply):
                raise ValueError("the tokens marked as a reply are not the reply")

    def _same(self, span: list[int], reply: str) -> bool:
        """Compares in tokens where the text does not survive decoding (the tokenizer may normalise it)."""
        decoded = str(self.tokenizer.decode(span)).strip()
        if decoded == reply:
            return True
        again = self.tokenizer.decode(self.tokenizer(reply, add_special_tokens=False)["input_ids"])
        return decoded == str(again).strip()


def _spans(ids: list[int], mask: list[int]) -> Iterator[list[int]]:
    """The runs of marked tokens."""
    span: list[int] = []
    for token, marked in zip(ids, mask, strict=True):
        if marked:
            span.append(token)
        elif span:
            yield span
            span = []
    if span:
        yield span


@dataclass(frozen=True)
class Prepared:
    """What was read: records trained on and held out, rejected and cut, and tokens with and without loss."""

    records: int
    held_out: int
    rejected: int
    cut: int
    tokens: int
    trained_tokens: int


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Dataset, Dataset, Prepared]:
    """Training rows, held-out rows and their summary, in `folder`: read once, then reused for the same inputs.

    Rows have `input_ids`, `labels` and `seq_lengths` (the lengths of the records in the row). The order depends on the
    seed alone. Raises TooManyRejected, and Refused when nothing is left to train on.
    """
    marker = folder / f"{fingerprint(recipe, tokenizer)}.json"
    train, held_out = folder / "train.arrow", folder / "held_out.arrow"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.json"):
            stale.unlink()
        summary = _tokenise(recipe, Renderer(tokenizer, recipe.data.max_length), folder)
        marker.write_text(json.dumps(asdict(summary)))
    summary = Prepared(**json.loads(marker.read_text()))
    return Dataset.from_file(str(train)), Dataset.from_file(str(held_out)), summary


def fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes the rows. A Hub dataset counts by its id."""
    digest = hashlib.sha256(recipe.data.model_dump_json().encode())
    digest.update(f"{recipe.seed} {tokenizer.chat_template}".encode())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for source in recipe.data.train:
        for path in sources.files(source):
            digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _tokenise(recipe: Recipe, render: Renderer, folder: Path) -> Prepared:
    rejects = Rejects(recipe.output / REJECTED, recipe.data.max_rejected)
    everything = folder / "all.arrow"
    _write(everything, map(asdict, _render(rejects, render, sources.read(recipe.data.train))))
    rows = Dataset.from_file(str(everything))
    if len(rows) <= recipe.data.held_out:
        raise Refused(f"{len(rows)} good records are not enough to hold out {recipe.data.held_out}")
    order = list(range(len(rows)))
    random.Random(recipe.seed).shuffle(order)
    kept, trained = rows.select(order[: recipe.data.held_out]), rows.select(order[recipe.data.held_out :])
    tokens = sum(len(row["input_ids"]) for row in trained)
    spoken = sum(len(row["labels"]) - row["labels"].count(IGNORED) for row in trained)
    for name, chosen in (("held_out", kept), ("train", trained)):
        _write(folder / f"{name}.arrow", _packed(chosen, recipe, folder / "packing.arrow"))
    for scratch in (everything, folder / "packing.arrow"):
        scratch.unlink(missing_ok=True)
    return Prepared(len(trained), len(kept), rejects.count, render.cut, tokens, spoken)


def _packed(rows: Dataset, recipe: Recipe, scratch: Path) -> Iterable[dict[str, list[int]]]:
    unpacked: Iterable[dict[str, list[int]]] = rows
    if not (recipe.data.packing and len(rows)):
        return unpacked
    columns = rows.select_columns(["input_ids", "labels"])
    uncached = {"cache_file_name": str(scratch), "load_from_cache_file": False}
    packed: Iterable[dict[str, list[int]]] = pack_dataset(columns, recipe.data.max_length, "bfd", uncached)
    return packed


def _render(rejects: Rejects, render: Renderer, entries: Iterable[Raw]) -> Iterator[Row]:
    rendered: list[Row] = []
    for _ in rejects.filter(entries, lambda record: rendered.append(render(record))):
        yield rendered.pop()


def _write(path: Path, rows: Iterable[dict[str, list[int]]]) -> None:
    """Rows to an Arrow stream, a thousand at a time: the data set never has to fit in memory."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, 1000)):
            stream.write_batch(pa.RecordBatch.from_pylist([_lengths(row) for row in batch], schema=SCHEMA))


def _lengths(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row that holds a single record says so."""
    return {"seq_lengths": [len(row["input_ids"])], **row}
