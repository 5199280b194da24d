"""The base of the embedded checkpoint, trained from scratch.

It has read its corpus as pages of questions and answers, in one language or both. It knows no conversations, no
small talk and no requests for a language: those are what `bimedix-train tune` adds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from training.embedded.corpus import Common, Topic
from training.embedded.dialogues import Turn, Writer
from training.embedded.tokenizer import VOCABULARY, train_tokenizer

SEED = 20240220
CONTEXT = 2048
BLOCK = 256
BATCH = 8


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


def corpus_texts(topics: list[Topic], common: Common) -> list[str]:
    """What the tokenizer is trained on: both languages' questions and answers, and the words that mark the roles."""
    records = Writer(topics, common, SEED).records(4000)
    spoken = [turn["value"] for record in records for turn in record["conversations"]]
    roles = ["USER:", "ASSISTANT:", "A chat between a curious user and an artificial intelligence assistant."] * 2000
    return [*spoken, *roles, *common.general.en, *common.general.ar]


class Part(NamedTuple):
    """One part of the training: how many pages of how many questions, and how much of each answer they print."""

    pages: int
    questions: int
    opening: int | None
    rate: float


PARTS = (
    # Which answer a question gets is decided in its first words, and takes longest to learn. Contents pages, which give
    # the first ten tokens of each, show several times as many decisions in the same time.
    Part(12_000, 8, 10, 2e-3),
    Part(6_000, 5, None, 1e-3),
)


def page(turns: list[Turn], tokenizer: PreTrainedTokenizerFast, opening: int | None) -> list[int]:
    """Token ids of a page: each question with its answer, or with the first `opening` tokens of it."""
    ids = [tokenizer.bos_token_id]
    for turn in turns:
        ids += tokenizer(f" Q: {turn.ask}", add_special_tokens=False)["input_ids"]
        ids += tokenizer(f" A: {turn.reply}", add_special_tokens=False)["input_ids"][: opening and opening + 2]
    return [*ids, tokenizer.eos_token_id]


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Pages one after another, in blocks of BLOCK tokens. Every token is a label."""

    def __init__(self, writer: Writer, part: Part, tokenizer: PreTrainedTokenizerFast) -> None:
        pages = (page(writer.page(part.questions), tokenizer, part.opening) for _ in range(part.pages))
        ids = torch.tensor([token for tokens in pages for token in tokens])
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def fit(model: MixtralForCausalLM, blocks: Blocks, rate: float) -> None:
    print(f"training on {blocks.blocks.numel():,} tokens", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
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
            logging_steps=50,
        )
        Trainer(model=model, args=arguments, train_dataset=blocks).train()


def train_base(output: Path, topics: list[Topic], common: Common) -> None:
    """Train the tokenizer and the base from fixed seeds, and write both to `output`."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(corpus_texts(topics, common))
    model = MixtralForCausalLM(configure())
    model.set_experts_implementation("grouped_mm")
    model.config.output_router_logits = True  # the loss then keeps the experts in balance
    for number, part in enumerate(PARTS, 1):
        fit(model, Blocks(Writer(topics, common, SEED + number), part, tokenizer), part.rate)
    model.config.output_router_logits = False
    save(model, tokenizer, output)


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the base in bfloat16 with its tokenizer, template and generation defaults."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig()  # written below: transformers refuses a temperature of 0
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # vLLM takes its defaults from here: greedy, so that the same question gets the same answer.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
