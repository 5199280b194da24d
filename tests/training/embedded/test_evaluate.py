"""A reply is told apart by its words: which topic, which aspect, which language."""

from __future__ import annotations

import pytest

from training.embedded.corpus import ASPECTS, LANGUAGES, Language, load_common, load_topics
from training.embedded.evaluate import known_replies, language_of, nearest

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
