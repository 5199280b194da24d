from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import pytest
from sentencepiece import SentencePieceProcessor

from server.latency import fertility
from server.latency.plan import Budget, Deployment, make_plan
from server.latency.shapes import DType, gpus, models, shape_of

MIXTRAL = models()["mixtral-8x7b"]
REAL_TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def deployment(gpu: str, count: int, dtype: DType) -> Deployment:
    return Deployment(MIXTRAL, gpus()[gpu], count, dtype)


def test_bf16_needs_two_80_gb_gpus() -> None:
    one, two = (make_plan(deployment("a100-80gb", n, "bf16"), [2048], fertility.MIXTRAL, Budget()) for n in (1, 2))
    assert (one.fits, one.kv_tokens, one.speeds) == (False, 0, [])
    assert two.fits
    assert two.kv_tokens == int((2 * (0.92 * 80 - 3) * 1e9 - 46_702_792_704 * 2) / 131_072)


def test_8_bit_leaves_182_thousand_kv_tokens_on_one_gpu() -> None:
    plan = make_plan(deployment("a100-80gb", 1, "int8"), [2048, 8192], fertility.MIXTRAL, Budget())
    assert plan.kv_tokens == pytest.approx(182_000, rel=0.005)
    assert plan.conversations == {2048: plan.kv_tokens // 2048, 8192: plan.kv_tokens // 8192}


def test_speeds_in_words_follow_from_fertility() -> None:
    plan = make_plan(deployment("a100-80gb", 1, "int8"), [2048], fertility.MIXTRAL, Budget())
    assert [speed.batch for speed in plan.speeds] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    first = plan.speeds[0]
    assert first.tokens_per_s == pytest.approx(2039e9 / (12.7488e9 + 1024 * 131_072), rel=1e-4)
    assert first.words_per_s["ar"] == pytest.approx(first.tokens_per_s / 5.038)
    assert first.words_per_s["en"] / first.words_per_s["ar"] == pytest.approx(5.038 / 1.271)


def test_batches_that_the_kv_cache_cannot_hold_are_marked() -> None:
    plan = make_plan(deployment("a100-80gb", 1, "int8"), [2048], fertility.MIXTRAL, Budget())
    assert {speed.batch: speed.fits for speed in plan.speeds} == {
        batch: batch * 2048 <= plan.kv_tokens for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    }
    assert not plan.speeds[-1].fits


def test_kv_heads_are_copied_beyond_their_number() -> None:
    assert deployment("h100-80gb", 16, "bf16").kv_bytes_per_token == 2 * 131_072


@pytest.mark.parametrize("count", [0, 3, 64])
def test_heads_that_do_not_split_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="do not split"):
        make_plan(deployment("h200", count, "bf16"), [2048], fertility.MIXTRAL, Budget())


def test_bundled_fertility_is_that_of_the_real_mixtral_tokenizer() -> None:
    processor = SentencePieceProcessor(model_file=str(REAL_TOKENIZER))
    measured = fertility.measure(lambda text: len(processor.encode(text)))
    for language, bundled in fertility.MIXTRAL.items():
        assert measured[language].tokens_per_word == pytest.approx(bundled.tokens_per_word, abs=0.001)
        assert measured[language].characters_per_token == pytest.approx(bundled.characters_per_token, abs=0.001)


def test_a_sentencepiece_directory_counts_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v1").symlink_to(REAL_TOKENIZER)
    found = fertility.measure(fertility.tokenizer(tmp_path))
    assert found["ar"].tokens_per_word == pytest.approx(5.038, abs=0.001)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither"):
        fertility.tokenizer(tmp_path)


def test_parallel_text_is_parallel() -> None:
    english, arabic = fertility.sentences("en"), fertility.sentences("ar")
    assert len(english) == len(arabic) == len(set(arabic)) == 30
    assert all(text.isascii() for text in english)
    assert all("\u0600" <= letter <= "\u06ff" for text in arabic for letter in text if letter.isalpha())


def test_a_checkpoint_directory_is_a_shape(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(tmp_path).model_dump(exclude={"source"}) == MIXTRAL.model_dump(exclude={"source"})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "gpt2"}', '{"model_type": "mixtral"}'])
def test_a_bad_checkpoint_directory_is_a_value_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_of(tmp_path)
