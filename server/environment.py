"""What vLLM, transformers and PyTorch read from the environment when they are imported."""

from __future__ import annotations

import os
from pathlib import Path

from server.settings import Settings


def prepare(settings: Settings) -> None:
    """Keep the libraries quiet, private and offline. To be called before the first of them is imported.

    What the user has set stays, except what would report usage or log prompts and replies.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if Path(settings.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DEBUG_LOG_API_SERVER_RESPONSE"] = "0"
