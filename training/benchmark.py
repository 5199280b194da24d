"""`python -m training.benchmark`: what tuning and merging cost, beside the obvious ways to do them.

Prints a table and then one JSON line. Every row is measured in a process of its own, on a random Mixtral: a small one
on a CPU, eight layers of Mixtral-8x7B's width on a GPU, where the time of the paper's run is projected from it.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from training.merge import merge_adapter
from training.mixtral import ADAPTED, ATTENTION_MATRICES, load
from training.rows import vicuna_tokenizer
from training.tune import nf4

T = TypeVar("T")
GIB = 2**30
STEPS = 3
PAPER_TOKENS = 2 * 632_000_000
PAPER_GPUS = 8
PAPER_LAYERS = 32
MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Size:
    shape: dict[str, int]
    layers: int
    tokens: int
    rank: int


CPU = Size(SMALL, layers=4, tokens=512, rank=32)
GPU = Size(MIXTRAL, layers=8, tokens=2048, rank=128)


@dataclass(frozen=True)
class Measured:
    """`peak_gib` is what the work added: on a CPU to the process, on a GPU to its memory."""

    what: str
    seconds: float
    peak_gib: float
    trainable_share: float | None = None
    tokens_per_second: float | None = None


def config(size: Size, layers: int, vocabulary: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, pad_token_id=0, **size.shape
    )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def ours(base: Path, rank: int) -> PeftModel:
    """Every expert matrix in NF4 with LoRA, as `tune` trains it."""
    model = load(base, dtype=torch.bfloat16, quantization=nf4(torch.bfloat16, torch.uint8), device_map={"": device()})
    return get_peft_model(model, LoraConfig(r=rank, target_modules=list(ADAPTED), task_type="CAUSAL_LM"))


def fused_bf16(base: Path, rank: int) -> PeftModel:
    """transformers' fused experts in bf16 with PEFT's adapters on the 3-D parameters."""
    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device()})
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"]
    lora = LoraConfig(r=rank, target_modules=list(ATTENTION_MATRICES), target_parameters=experts, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def unguarded_4bit(base: Path, rank: int) -> PeftModel:
    """`load_in_4bit` on the fused model: the experts stay in bf16 and only q, k and v are trained."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = MixtralForCausalLM.from_pretrained(base, quantization_config=quantization, device_map={"": device()})
    return get_peft_model(model, LoraConfig(r=rank, target_modules=list(ATTENTION_MATRICES), task_type="CAUSAL_LM"))


TUNED: dict[str, Callable[[Path, int], PeftModel]] = {
    "unfused 4-bit, LoRA everywhere (this project)": ours,
    "fused bf16, LoRA everywhere": fused_bf16,
    "unguarded load_in_4bit, LoRA on q, k, v": unguarded_4bit,
}


def measure_tuning(what: str, base: Path, size: Size) -> Measured:
    """Forward, backward and AdamW on one row, the first step apart."""
    before = _memory()
    model = TUNED[what](base, size.rank)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(3, 1000, (1, size.tokens), device=device())
    for step in range(STEPS + 1):
        if step == 1:
            started = time.monotonic()
        with torch.autocast(device(), torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        loss.detach().item()  # waits for the GPU
    seconds = (time.monotonic() - started) / STEPS
    trainable, everything = sum(p.numel() for p in trained), _parameters(base)
    return Measured(
        what, round(seconds, 3), _peak(before), round(trainable / everything, 5), round(size.tokens / seconds, 1)
    )


def _parameters(base: Path) -> int:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig.from_pretrained(base))
    return sum(parameter.numel() for parameter in model.parameters())


def measure_merge(what: str, base: Path, adapter: Path) -> Measured:
    before, started = _memory(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        if what.startswith("merge_and_unload"):
            model = load(base, dtype=torch.bfloat16)
            PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
        else:
            merge_adapter(adapter, Path(folder) / "merged")
    return Measured(what, round(time.monotonic() - started, 2), _peak(before))


def _memory() -> float:
    """The most GiB this process held so far. Not getrusage's, which begins with what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _peak(before: float) -> float:
    """GiB since `before`: what the process or, on a GPU, its memory grew to at most."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / GIB, 2)
    return round(_memory() - before, 2)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Runs in a fresh process, so that its memory is its own, and given back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_base(directory: Path, size: Size, layers: int, tokenizer: Path) -> Path:
    """A random checkpoint in bf16, in shards of at most 1 GB."""
    words = vicuna_tokenizer(tokenizer)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config(size, layers, len(words)))
    model.save_pretrained(directory, max_shard_size="1GB")
    words.save_pretrained(directory)
    return directory


def make_adapter(directory: Path, base: Path, rank: int) -> Path:
    lora = LoraConfig(r=rank, target_modules=list(ADAPTED), task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load(base, dtype=torch.bfloat16), lora).save_pretrained(directory)
    return directory


def layers_for(gigabytes: float, size: Size, vocabulary: int) -> int:
    """How many layers make a bf16 checkpoint of about this size."""
    with torch.device("meta"):
        one, two = (
            sum(parameter.numel() for parameter in MixtralForCausalLM(config(size, layers, vocabulary)).parameters())
            for layers in (1, 2)
        )
    return max(1, round((gigabytes * 1e9 / 2 - (2 * one - two)) / (two - one)))


def table(rows: list[Measured]) -> str:
    lines = [f"{'':48}{'seconds':>9}{'peak GiB':>10}{'tok/s':>9}{'trained':>9}"]
    for row in rows:
        speed = f"{row.tokens_per_second:9.0f}" if row.tokens_per_second else " " * 9
        share = f"{row.trainable_share:9.2%}" if row.trainable_share else " " * 9
        lines.append(f"{row.what:48}{row.seconds:9.2f}{row.peak_gib:10.2f}{speed}{share}")
    return "\n".join(lines)


def projected_hours(row: Measured, layers: int) -> float:
    """The paper's run on eight such GPUs, from a step of fewer layers; embeddings and logits are left out."""
    assert row.tokens_per_second
    return PAPER_TOKENS / (row.tokens_per_second * layers / PAPER_LAYERS * PAPER_GPUS) / 3600


def main(
    tokenizer: Annotated[Path, typer.Option(help="Checkpoint directory whose tokenizer is used.")],
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint that is merged, in GB.")] = 1.0,
    scratch: Annotated[Path | None, typer.Option(help="Where the random checkpoints go.")] = None,
) -> None:
    """Measure tuning and merging on this machine."""
    size = GPU if torch.cuda.is_available() else CPU
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        base = apart(make_base, Path(folder) / "base", size, size.layers, tokenizer)
        tuned = [apart(measure_tuning, what, base, size) for what in TUNED]
        layers = layers_for(gigabytes, size, len(vicuna_tokenizer(tokenizer)))
        large = apart(make_base, Path(folder) / "large", size, layers, tokenizer)
        adapter = apart(make_adapter, Path(folder) / "adapter", large, size.rank)
        ways = ("merge, checked (this project)", "merge_and_unload and save_pretrained, unchecked")
        merged = [apart(measure_merge, what, large, adapter) for what in ways]
    print(f"tuning: {size.layers} layers of width {size.shape['hidden_size']}, {size.tokens} tokens a step, {device()}")
    print(table(tuned))
    hours = round(projected_hours(tuned[0], size.layers), 1) if torch.cuda.is_available() else None
    print(f"the paper's run on eight of these GPUs: {hours} h (the paper: 35 h)" if hours else "no GPU: not projected")
    print(f"merging: a checkpoint of {gigabytes} GB")
    print(table(merged))
    print(json.dumps({"tuning": [asdict(r) for r in tuned], "merging": [asdict(r) for r in merged], "hours": hours}))


if __name__ == "__main__":
    typer.run(main)
