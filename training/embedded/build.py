"""Builds the embedded checkpoint from its corpus: `python -m training.embedded.build --output server/embedded`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from training.embedded.corpus import Common, Topic, load_common, load_topics
from training.embedded.dialogues import Record, Writer
from training.embedded.evaluate import evaluate, table
from training.embedded.tokenizer import VOCABULARY, train_tokenizer

SEED = 20240220
CONTEXT = 2048
IGNORED = -100
OUTPUT = Path(__file__).parents[2] / "server" / "embedded"


def configure() -> MixtralConfig:
    """Mixtral in small: 8 experts of which 2 see each token, grouped-query attention; 11.0M parameters, 22 MB."""
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )


def messages(record: Record) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]


class Conversations(Dataset[dict[str, torch.Tensor]]):
    """Records as token ids, with labels on the assistant's turns only."""

    def __init__(self, records: Iterator[Record], tokenizer: PreTrainedTokenizerFast) -> None:
        self.rows = [self._row(record, tokenizer) for record in records]

    @staticmethod
    def _row(record: Record, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
        encoded = tokenizer.apply_chat_template(
            messages(record), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(encoded["input_ids"][:CONTEXT])
        spoken = torch.tensor(encoded["assistant_masks"][:CONTEXT], dtype=torch.bool)
        return {"input_ids": ids, "labels": torch.where(spoken, ids, IGNORED), "length": torch.tensor(len(ids))}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest: `input_ids`, `labels` and `attention_mask`, each (batch, tokens)."""
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
    }


def corpus_texts(topics: list[Topic], common: Common) -> list[str]:
    """What the tokenizer is trained on: whole rendered conversations, so that role words become tokens too."""
    records = Writer(topics, common, SEED).records(4000)
    spoken = [turn["value"] for record in records for turn in record["conversations"]]
    roles = ["USER:", "ASSISTANT:", "A chat between a curious user and an artificial intelligence assistant."] * 2000
    return [*spoken, *roles, *common.general.en, *common.general.ar]


def fit(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Conversations, batch: int, rate: float
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            seed=SEED,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            dataloader_num_workers=0,
            remove_unused_columns=False,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = OUTPUT,
    conversations: Annotated[int, typer.Option(help="Conversations to train on.")] = 24_000,
    batch: Annotated[int, typer.Option(help="Conversations a step.")] = 8,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
) -> None:
    """Train the tokenizer and the model, write the checkpoint, and print what it can do."""
    torch.manual_seed(SEED)
    topics, common = load_topics(), load_common()
    tokenizer = train_tokenizer(corpus_texts(topics, common))
    rows = Conversations(Writer(topics, common, SEED + 1).records(conversations), tokenizer)
    model = MixtralForCausalLM(configure())
    model.set_experts_implementation("grouped_mm")
    tokens = sum(int(row["length"]) for row in rows.rows)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens:,} tokens to train on", flush=True)
    fit(model, tokenizer, rows, batch, rate)
    save(model, tokenizer, output)
    print(table(evaluate(model, tokenizer, topics, common)))


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
