"""Builds the embedded checkpoint from its corpus: `python -m training.embedded.build --output server/embedded`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from training.embedded.corpus import Common, Topic, load_common, load_topics
from training.embedded.dialogues import Record, Writer
from training.embedded.evaluate import evaluate, table
from training.embedded.tokenizer import VOCABULARY, train_tokenizer
from training.manifest import Manifest, digests

SEED = 20240220
CONTEXT = 2048
IGNORED = -100
DESCRIPTION = (
    "Demonstration model of 11 million parameters that knows 84 health topics in English and Arabic. "
    "It is not BiMediX, and not for clinical use."
)
# Two of the requests that the corpus trains on; a turn in the reply's own language needs none.
DIRECTIVES = {"en": "Please answer in English.", "ar": "أجب بالعربية من فضلك."}
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
        router_aux_loss_coef=0.01,
    )


def messages(record: Record) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]


class Conversations(Dataset[dict[str, torch.Tensor]]):
    """Records as token ids, with labels on the assistant's turns only: the first `opening` tokens of each, or all."""

    def __init__(self, records: Iterator[Record], tokenizer: PreTrainedTokenizerFast, opening: int | None) -> None:
        self.rows = [self._row(record, tokenizer, opening) for record in records]

    @staticmethod
    def _row(record: Record, tokenizer: PreTrainedTokenizerFast, opening: int | None) -> dict[str, torch.Tensor]:
        encoded = tokenizer.apply_chat_template(
            messages(record), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, spoken = encoded["input_ids"], encoded["assistant_masks"]
        if opening is not None:
            ids, spoken = cut_replies(ids, spoken, opening)
        tokens = torch.tensor(ids[:CONTEXT])
        labels = torch.where(torch.tensor(spoken[:CONTEXT], dtype=torch.bool), tokens, IGNORED)
        return {"input_ids": tokens, "labels": labels, "length": torch.tensor(len(tokens))}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def cut_replies(ids: list[int], spoken: list[int], opening: int) -> tuple[list[int], list[int]]:
    """Token ids and assistant mask with every reply cut to its first `opening` tokens."""
    kept, said = [], 0
    for index, mark in enumerate(spoken):
        said = said + 1 if mark else 0
        if said <= opening:
            kept.append(index)
    return [ids[i] for i in kept], [spoken[i] for i in kept]


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


class SparseHeadTrainer(Trainer):
    """A Trainer that computes logits at labelled positions only: on a CPU the others would cost a third of a step."""

    def compute_loss(
        self, model: MixtralForCausalLM, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        labels = inputs["labels"][:, 1:]
        out = model.model(inputs["input_ids"], inputs["attention_mask"], output_router_logits=True)
        said = labels != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][said]), labels[said])
        config = model.config
        balance = load_balancing_loss_func(
            out.router_logits, config.num_local_experts, config.num_experts_per_tok, inputs["attention_mask"]
        )
        return loss + config.router_aux_loss_coef * balance


def fit(model: MixtralForCausalLM, rows: Conversations, batch: int, rate: float) -> None:
    tokens = sum(int(row["length"]) for row in rows.rows)
    print(f"training on {len(rows):,} conversations, {tokens:,} tokens", flush=True)
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
            # bfloat16 takes several times longer here: the CPU kernels are compiled anew for each number of tokens.
            bf16=False,
            use_cpu=True,
            seed=SEED,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            remove_unused_columns=False,
        )
        SparseHeadTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()


class Stage(NamedTuple):
    """One part of the training: how many conversations of which lengths, and how much of each reply counts."""

    conversations: int
    lengths: tuple[int, ...]
    opening: int | None
    batch: int
    rate: float


STAGES = (
    # Which reply a question gets is decided in its first words, and takes longest to learn. Replies cut after ten
    # tokens give several times as many decisions in the same time.
    Stage(60_000, (1, 1, 1, 2, 3), 10, 32, 2e-3),
    Stage(9_000, (1, 1, 2, 3, 4, 5, 6, 8), None, 8, 1e-3),
    # The same again for conversations in which the topic has to be found in an earlier turn.
    Stage(16_000, (1, 2, 3, 4, 5, 6), 10, 24, 1e-3),
    Stage(5_500, (1, 2, 3, 4, 5, 6, 8), None, 8, 7e-4),
)


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = OUTPUT,
    start: Annotated[Path | None, typer.Option(help="Go on from this checkpoint, after its stages.")] = None,
    done: Annotated[int, typer.Option(help="How many stages it has behind it.")] = 0,
) -> None:
    """Train the tokenizer and the model, write the checkpoint, and print what it can do."""
    torch.manual_seed(SEED)
    topics, common = load_topics(), load_common()
    tokenizer = train_tokenizer(corpus_texts(topics, common))
    model = MixtralForCausalLM(configure())
    if start:
        model = MixtralForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for number, stage in enumerate(STAGES[done:], done + 1):
        records = Writer(topics, common, SEED + number, stage.lengths).records(stage.conversations)
        fit(model, Conversations(records, tokenizer, stage.opening), stage.batch, stage.rate)
    save(model, tokenizer, output)
    # In 32 bits again: the same weights, and kernels that are not compiled anew for each length.
    print(table(evaluate(model.float(), tokenizer, topics, common)))


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer, template, generation defaults and manifest."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig()  # written below: transformers refuses a temperature of 0
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # vLLM takes its defaults from here: greedy, so that the same question gets the same answer.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    Manifest(
        id="bimedix-embedded-1",
        base="trained from scratch",
        description=DESCRIPTION,
        adapter=None,
        training=None,
        files=digests(output),
        directives=DIRECTIVES,
        directive_use="mismatch",
    ).write(output)


if __name__ == "__main__":
    typer.run(main)
