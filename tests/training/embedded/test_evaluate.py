"""A reply is told apart by its words: which topic, which aspect, which language."""

from __future__ import annotations

import pytest
import torch

from server.settings import EMBEDDED_CHECKPOINT
from training.embedded.corpus import ASPECTS, LANGUAGES, Language, load_common, load_topics
from training.embedded.evaluate import ROWS, evaluate, known_replies, language_of, nearest
from training.mixtral import load
from training.rows import vicuna_tokenizer

TOPICS, COMMON = load_topics(), load_common()
KNOWN = known_replies(TOPICS, COMMON)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_answer_is_found_also_when_it_stops_early(language: Language) -> None:
    for topic in TOPICS:
        for aspect in ASPECTS:
            answer = topic.side(language).answers.of(aspect)
            for said in (answer, answer[: len(answer) * 3 // 4]):
                found = nearest(said, KNOWN)
                assert found is not None
                assert (found.topic, found.aspect) == (topic.id, aspect)
                assert language_of(said) == language


def test_what_no_answer_resembles_counts_for_none() -> None:
    assert nearest("", KNOWN) is None
    assert nearest("The train to the coast leaves at nine from the second platform.", KNOWN) is None


def test_the_embedded_checkpoint_knows_its_topics_and_follows_requests() -> None:
    """On 4 of its 84 topics, well under what it does on all of them. Its base follows hardly any request."""
    model = load(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    shares = evaluate(model, vicuna_tokenizer(EMBEDDED_CHECKPOINT), TOPICS[:4], COMMON)
    assert set(shares) == {f"{kind} {language}" for kind in ROWS for language in LANGUAGES}
    assert min(shares[f"topic {language}"] for language in LANGUAGES) > 0.5
    assert min(shares[f"{kind} {language}"] for kind in ("language", "requested") for language in LANGUAGES) >= 0.75
