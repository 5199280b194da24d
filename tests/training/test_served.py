"""From records to a served checkpoint: tune, merge, and vLLM gives the tokens that PEFT gives in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import MixtralForCausalLM

from tests.training.conftest import EMBEDDED, small_config
from training.merge import merge_adapter
from training.mixtral import load
from training.rows import vicuna_tokenizer
from training.tune import run

SERVE = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.1)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
replies = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
print(json.dumps([list(reply.outputs[0].token_ids) for reply in replies]))
"""
ASKS = ("I have had a fever for a day 1.0", "عندي حمى منذ يوم 3.0")


def served(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(checkpoint), json.dumps(prompts)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    replies: list[list[int]] = json.loads(result.stdout.strip().splitlines()[-1])
    return replies


def test_the_served_checkpoint_answers_as_the_adapter_does(make_recipe: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(7)
    # vLLM's attention on a CPU wants heads at least 32 wide.
    MixtralForCausalLM(small_config(hidden_size=128, head_dim=32)).to(torch.bfloat16).save_pretrained(base)
    tokenizer = vicuna_tokenizer(EMBEDDED)
    tokenizer.save_pretrained(base)
    learns = {"optimiser": {"learning_rate": 1e-2, "epochs": 8}, "lora": {"rank": 16, "alpha": 32}}
    run(make_recipe(base=str(base), data={"max_length": 256}, **learns))
    adapter = tmp_path / "run" / "adapter"
    merge_adapter(adapter, tmp_path / "merged")
    prompts = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": ask}], tokenize=True)["input_ids"])
        for ask in ASKS
    ]
    model = PeftModel.from_pretrained(load(base, dtype=torch.float32), str(adapter)).eval()
    expected = [
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(ids) :]
        for ids in prompts
    ]
    assert served(tmp_path / "merged", prompts) == [reply.tolist() for reply in expected]
