"""The two vocabularies that the guard is tested with."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from server.language.guard import Tables
from server.language.token_classes import Vocabulary, read_vocabulary
from server.settings import EMBEDDED_CHECKPOINT


@pytest.fixture(scope="session", params=["mixtral", "embedded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real Mixtral tokenizer, from the mistral-common package, and the embedded checkpoint's."""
    if request.param == "embedded":
        return AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    directory = tmp_path_factory.mktemp("mixtral")
    shutil.copy(Path(str(files("mistral_common") / "data" / "tokenizer.model.v1")), directory / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return read_vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.fixture(scope="session")
def tables(vocabulary: Vocabulary) -> Tables:
    return Tables(vocabulary)
