"""Small random Mixtrals and records for the tests of `training`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from training.recipe import Recipe
from training.rows import vicuna_tokenizer

EMBEDDED = Path(__file__).parents[2] / "server" / "embedded"


def small_config(**changes: Any) -> MixtralConfig:
    """Two layers, four experts, 64 wide."""
    shape = {
        "vocab_size": 6144,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": None,
        "initializer_range": 0.1,
    }
    return MixtralConfig(**{**shape, **changes})


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On matrices this small, threads wait for each other longer than they work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral checkpoint in bf16, with the embedded checkpoint's tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    MixtralForCausalLM(small_config()).to(torch.bfloat16).save_pretrained(directory)
    vicuna_tokenizer(EMBEDDED).save_pretrained(directory)
    return directory


ANSWERS = {
    "en": "Rest, drink water, and see a doctor if the fever lasts more than three days.",
    "ar": "استرح واشرب الماء وراجع الطبيب إذا استمرت الحمى أكثر من ثلاثة أيام.",
}


def records(count: int) -> list[dict[str, Any]]:
    """`count` conversations of one to three exchanges, in either language."""
    made = []
    for number in range(count):
        language = "ar" if number % 3 == 0 else "en"
        ask = "عندي حمى منذ يوم" if language == "ar" else "I have had a fever for a day"
        turns = []
        for exchange in range(1 + number % 3):
            turns.append({"from": "human", "value": f"{ask} {number}.{exchange}"})
            turns.append({"from": "gpt", "value": f"{ANSWERS[language]} {exchange}"})
        made.append({"id": number, "conversations": turns})
    return made


def write_lines(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(base: Path, tmp_path: Path) -> Any:
    """Recipes at test size; keyword arguments replace settings, dictionaries those of a section."""
    data = write_lines(tmp_path / "records.jsonl", records(48))

    def make(**changes: Any) -> Recipe:
        settings: dict[str, Any] = {
            "base": str(base),
            "output": str(tmp_path / "run"),
            "quantization": "none",
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": [str(data)], "held_out": 4, "max_length": 128, "packing": True},
            "optimiser": {"learning_rate": 1e-3, "warmup_steps": 1, "epochs": 1, "effective_batch": 4},
            "run": {"log_steps": 1, "eval_steps": 100, "save_steps": 2},
            "gradient_checkpointing": False,
            "zero": 0,
        }
        for key, value in changes.items():
            settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
        return Recipe.model_validate(settings)

    return make
