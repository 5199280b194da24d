"""The base of the embedded checkpoint, trained from scratch.

It has read its corpus as pages of questions and answers and as transcripts of chats, in one language or both. Nobody in
them asks for a language; they have no system prompt, and replies no marked end: `bimedix-train tune` adds those.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

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
TOKENS_A_STEP = 2048


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
    """One part of the training: how many texts of how many questions, how many tokens of each answer they hold (None:
    all), and how many tokens are read in one go."""

    kind: Literal["page", "transcript"]
    texts: int
    questions: int
    opening: int | None
    block: int
    rate: float


PARTS = (
    # Which answer a question gets is decided in its first words, and takes longest to learn. Contents pages, which give
    # the first ten tokens of each, show several times as many decisions in the same time.
    Part("page", 12_000, 8, 10, 256, 2e-3),
    Part("page", 6_000, 5, None, 256, 1e-3),
    # A base has read chats too, if without system prompts. All the corpus says is in here, if nobody asks for a
    # language: what a base has never read, an adapter would have to learn by heart.
    Part("transcript", 14_000, 5, 10, 256, 1.5e-3),
    Part("transcript", 6_000, 5, None, 1024, 1e-3),
)
MARKS = {"page": ("Q", "A"), "transcript": ("USER", "ASSISTANT")}


def text(turns: list[Turn], tokenizer: PreTrainedTokenizerFast, part: Part) -> list[int]:
    """Token ids: each question with its answer, or with the first `part.opening` tokens of it."""
    ids = [tokenizer.bos_token_id]
    asked, answered = MARKS[part.kind]
    for turn in turns:
        ids += tokenizer(f" {asked}: {turn.ask} {answered}:", add_special_tokens=False)["input_ids"]
        ids += tokenizer(f" {turn.reply}", add_special_tokens=False)["input_ids"][: part.opening]
    return [*ids, tokenizer.eos_token_id]


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Texts one after another, in blocks of `part.block` tokens. Every token is a label."""

    def __init__(self, writer: Writer, part: Part, tokenizer: PreTrainedTokenizerFast) -> None:
        write = writer.page if part.kind == "page" else writer.transcript
        texts = (text(write(part.questions), tokenizer, part) for _ in range(part.texts))
        ids = torch.tensor([token for tokens in texts for token in tokens])
        self.blocks = ids[: len(ids) // part.block * part.block].view(-1, part.block)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def fit(model: MixtralForCausalLM, blocks: Blocks, part: Part) -> None:
    print(f"training on {blocks.blocks.numel():,} tokens", flush=True)
    model.set_experts_implementation("grouped_mm")
    model.config.output_router_logits = True  # the loss then keeps the experts in balance
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=TOKENS_A_STEP // part.block,
            learning_rate=part.rate,
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
    """Train the tokenizer and the base from fixed seeds, and write both to `output`.

    The model after each part is kept beside `output`, so that a later call goes on after the last one.
    """
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(corpus_texts(topics, common))
    model = MixtralForCausalLM(configure())
    for number, part in enumerate(PARTS, 1):
        after = output.with_name(f"{output.name}-{number}")
        if not after.exists():
            blocks = Blocks(Writer(topics, common, SEED + number), part, tokenizer)
            fit(model, blocks, part)
            save(model, tokenizer, after)
        model = MixtralForCausalLM.from_pretrained(after, dtype=torch.float32)
    after.rename(output)


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the base in bfloat16 with its tokenizer, template and generation defaults."""
    unfinished = output.with_name(f"{output.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig()  # written below: transformers refuses a temperature of 0
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    # vLLM takes its defaults from here: greedy, so that the same question gets the same answer.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.0}
    (unfinished / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    unfinished.rename(output)
