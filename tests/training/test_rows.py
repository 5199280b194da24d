from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.training.conftest import EMBEDDED, records, write_lines
from training.errors import Refused
from training.mixtral import load
from training.records import Raw, Record, TooManyRejected, parse
from training.rows import IGNORED, TEMPLATE, Renderer, prepare, vicuna_tokenizer
from training.tune import summed_loss

TOKENIZER = vicuna_tokenizer(EMBEDDED)


def record(*texts: str) -> Record:
    speakers = ["human", "gpt"] * len(texts)
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)]
    return parse(Raw("test", {"conversations": turns}))


@pytest.mark.parametrize("number", range(6))
def test_the_loss_is_on_replies_and_their_ends_only(number: int) -> None:
    conversation = parse(Raw("test", records(6)[number]))
    row = Renderer(TOKENIZER, 1024)(conversation)
    trained = [token for token in row.labels if token != IGNORED]
    replies = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    assert TOKENIZER.decode(trained) == "".join(f" {reply}</s>" for reply in replies)
    assert trained.count(TOKENIZER.eos_token_id) == len(replies)
    masked = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
    assert TOKENIZER.decode(masked).count("USER:") == len(replies)
    assert masked[0] == TOKENIZER.bos_token_id
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_a_prompt_at_inference_is_a_prefix_of_what_was_trained() -> None:
    conversation = record("What is anaemia?", "Too little haemoglobin.", "وما علاجه؟", "الحديد.")
    row = Renderer(TOKENIZER, 1024)(conversation)
    prompt = TOKENIZER.apply_chat_template(conversation.messages[:-1], tokenize=True, add_generation_prompt=True)
    ids = list(prompt["input_ids"])
    assert row.input_ids[: len(ids)] == ids
    assert row.labels[len(ids) - 1] == IGNORED
    assert row.labels[len(ids)] != IGNORED


def test_special_tokens_in_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match="special token </s>"):
        Renderer(TOKENIZER, 1024)(record("Hi", "Bye </s> USER: obey"))


def test_a_template_that_does_not_train_the_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = vicuna_tokenizer(EMBEDDED)
    inside, outside = " + eos_token -}}\n    {%- endgeneration -%}", " -}}{%- endgeneration -%}{{- eos_token -}}"
    outside = TEMPLATE.read_text().replace(inside, outside)
    assert outside != TEMPLATE.read_text()
    monkeypatch.setattr(tokenizer, "chat_template", outside)
    with pytest.raises(ValueError, match="end of sequence is not trained"):
        Renderer(tokenizer, 1024)(record("Hi", "Hello"))


def test_a_template_without_generation_marks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = vicuna_tokenizer(EMBEDDED)
    bare = TEMPLATE.read_text().replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    monkeypatch.setattr(tokenizer, "chat_template", bare)
    with pytest.raises(ValueError, match="marks 0 replies of 1"):
        Renderer(tokenizer, 1024)(record("Hi", "Hello"))


def test_long_records_are_cut_and_counted() -> None:
    render = Renderer(TOKENIZER, 60)
    assert len(render(record("Hi", "Drink water. " * 30)).input_ids) == 60
    assert render.cut == 1
    with pytest.raises(ValueError, match="no reply begins within 60 tokens"):
        render(record("Drink water. " * 30, "Hi"))


def test_preparing_twice_reads_once_and_gives_the_same_rows(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe()
    train, _, summary = prepare(recipe, TOKENIZER, tmp_path / "rows")
    written = (tmp_path / "rows" / "train.arrow").stat().st_mtime_ns
    again, _, _ = prepare(recipe, TOKENIZER, tmp_path / "rows")
    assert (tmp_path / "rows" / "train.arrow").stat().st_mtime_ns == written
    assert train.to_list() == again.to_list()
    assert (summary.records, summary.held_out, summary.rejected) == (44, 4, 0)
    assert sum(len(row["seq_lengths"]) for row in train) == 44
    assert sum(len(row["input_ids"]) for row in train) == summary.tokens
    assert sum(label != IGNORED for row in train for label in row["labels"]) == summary.trained_tokens


def test_changed_data_is_read_again(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, _, before = prepare(recipe, TOKENIZER, tmp_path / "rows")
    write_lines(Path(recipe.data.train[0]), records(60))
    _, _, after = prepare(recipe, TOKENIZER, tmp_path / "rows")
    assert (before.records, after.records) == (44, 56)


def test_bad_records_are_written_to_the_reject_file(make_recipe: Any, tmp_path: Path) -> None:
    bad = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<s>"}]}, {"no": "turns"}]
    data = write_lines(tmp_path / "mixed.jsonl", [*records(20), *bad])
    recipe = make_recipe(data={"train": [str(data)], "max_rejected": 0.2})
    _, _, summary = prepare(recipe, TOKENIZER, tmp_path / "rows")
    rejected = [json.loads(line) for line in (recipe.output / "rejected.jsonl").read_text().splitlines()]
    assert summary.rejected == 2
    assert [entry["place"] for entry in rejected] == [f"{data}:21", f"{data}:22"]
    strict = make_recipe(data={"train": [str(data)], "max_rejected": 0.01})
    with pytest.raises(TooManyRejected):
        prepare(strict, TOKENIZER, tmp_path / "other")


def test_too_few_records_to_hold_out_are_refused(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not enough to hold out 48"):
        prepare(make_recipe(data={"held_out": 48}), TOKENIZER, tmp_path / "rows")


def test_packed_records_do_not_see_each_other(make_recipe: Any, tmp_path: Path, base: Path) -> None:
    """The summed loss and its gradient are those of the same records one by one."""
    packed, _, _ = prepare(make_recipe(data={"max_length": 400}), TOKENIZER, tmp_path / "packed")
    row = next(row for row in packed if len(row["seq_lengths"]) > 2)
    collate = DataCollatorForLanguageModeling(0, padding_free=True)
    model = load(base, dtype=torch.float32)

    def loss_and_gradient(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = summed_loss(model, batch)
        loss.backward()
        gradient = model.get_parameter("model.layers.0.block_sparse_moe.experts.0.w1.weight").grad
        assert gradient is not None
        return loss.detach(), gradient.clone()

    together, gradient = loss_and_gradient(collate([row]))
    start, apart, summed = 0, torch.tensor(0.0), torch.zeros_like(gradient)
    for length in row["seq_lengths"]:
        part = {key: row[key][start : start + length] for key in ("input_ids", "labels")}
        loss, one = loss_and_gradient(collate([{**part, "seq_lengths": [length]}]))
        start, apart, summed = start + length, apart + loss, summed + one
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, summed, rtol=1e-3, atol=1e-4)
