"""Settings to vLLM's engine arguments."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import get_args

from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server.checkpoints.unmerged import parse_entries, read_unmerged
from server.settings import EMBEDDED_CHECKPOINT, Settings

EXTENSION = "server.engine_worker.WorkerExtension"
MOST_ADAPTERS = 64
"""How many adapters may be loaded at once; each takes memory only when it is."""
ATTENTION_AND_ROUTER = ("qkv_proj", "o_proj", "gate")
NO_TRITON = (
    "vLLM applies adapters to experts with Triton, which this machine has not (it needs a GPU). Merge the adapter "
    "instead: bimedix-train merge DIR --output CHECKPOINT, then serve it with --model CHECKPOINT, or bring it in with "
    "bimedix checkpoints add and activate it"
)


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(message)


def parse_engine_flags(settings: Settings) -> Namespace:
    """vLLM's own engine flags, with defaults fit for the machine. Raises ValueError for one vLLM does not know."""
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False))
    parser.add_argument("--chat-template")
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser")
    # Whatever the user passes comes after these.
    flags = ["--model", settings.model, "--served-model-name", settings.served_model_name]
    if current_platform.is_cpu():
        flags += _laptop_defaults(settings)
    if settings.takes_adapters:
        flags += _adapter_defaults(settings)
    args, unknown = parser.parse_known_args([*flags, *settings.engine_flags])
    if unknown:
        raise ValueError(f"vLLM has no engine flag {unknown[0]!r}; bimedix serve --help says where they are listed")
    args.enable_log_requests = False
    if current_platform.is_cpu() and args.enforce_eager:
        # Else the first request for log probabilities has everyone wait, for tens of seconds, while they are compiled.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if args.worker_extension_cls:
        raise ValueError("--worker-extension-cls: this service needs vLLM's worker extension for itself")
    args.worker_extension_cls = EXTENSION
    return args


def _laptop_defaults(settings: Settings) -> list[str]:
    """Flags for a CPU: start quickly and leave the memory to others."""
    flags = ["--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", "64"]
    if Path(settings.model) == EMBEDDED_CHECKPOINT:
        # 64 conversations of the full 2,048 tokens, at 4,096 bytes a token; vLLM would claim most of the memory.
        flags += ["--kv-cache-memory-bytes", str(2**29), "--gpu-memory-utilization", "0.1"]
    return flags


def _adapter_defaults(settings: Settings) -> list[str]:
    """Flags with which vLLM applies adapters at run time. Raises ValueError for adapters that it can't apply here."""
    adapters = [read_unmerged(name, directory) for name, directory in parse_entries(settings.adapters).items()]
    if not HAS_TRITON and any(adapter.adapts_experts for adapter in adapters):
        raise ValueError(f"--adapter: {NO_TRITON}")
    needed = max((adapter.rank for adapter in adapters), default=1)
    # One more than there are: a new revision is applied while replies on the old one still run.
    flags = ["--enable-lora", "--max-loras", str(len(adapters) + 1), "--max-cpu-loras", str(MOST_ADAPTERS)]
    flags += ["--max-lora-rank", str(next((rank for rank in get_args(MaxLoRARanks) if rank >= needed), needed))]
    return flags if HAS_TRITON else [*flags, "--lora-target-modules", *ATTENTION_AND_ROUTER]
