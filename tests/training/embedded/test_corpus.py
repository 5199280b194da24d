"""The corpus is complete, both languages of it, and its held-out questions stay out of training."""

from __future__ import annotations

from itertools import pairwise

from training.embedded.corpus import ARABIC_LETTER, ASPECTS, DIRECTIVES, LANGUAGES, load_common, load_topics, same
from training.embedded.dialogues import Writer, held_out

TOPICS, COMMON = load_topics(), load_common()


def test_at_least_eighty_topics_in_both_languages() -> None:
    assert len(TOPICS) >= 80
    assert all(len(topic.side(language).also) >= 1 for topic in TOPICS for language in LANGUAGES)


def test_every_topic_holds_out_a_phrasing_for_each_aspect_and_language() -> None:
    questions = [question for question in held_out(TOPICS, COMMON) if question.aspect]
    assert len(questions) == len(TOPICS) * len(ASPECTS) * len(LANGUAGES)


def test_held_out_questions_are_never_written() -> None:
    kept = {same(question.text) for question in held_out(TOPICS, COMMON)}
    writer = Writer(TOPICS, COMMON, seed=7, requests=0.5)
    said = {same(turn.ask) for _ in range(3000) for turn in writer.conversation()}
    printed = {same(turn.ask) for _ in range(1000) for turn in (*writer.page(8), *writer.transcript(5))}
    assert not kept & (said | printed)


def test_pages_hold_answers_in_the_language_of_their_question_only() -> None:
    replies = {
        language: {topic.side(language).answers.of(aspect) for topic in TOPICS for aspect in ASPECTS}
        for language in LANGUAGES
    }
    writer = Writer(TOPICS, COMMON, seed=8)
    for turn in (turn for _ in range(200) for turn in writer.page(8)):
        assert turn.reply in replies["ar" if ARABIC_LETTER.search(turn.ask) else "en"]


def test_the_same_seed_writes_the_same_conversations() -> None:
    first, second = (list(Writer(TOPICS, COMMON, seed=3).records(50)) for _ in range(2))
    assert first == second
    assert first != list(Writer(TOPICS, COMMON, seed=4).records(50))


def test_conversations_switch_language_both_ways() -> None:
    def arabic(text: str) -> bool:
        return any("\u0621" <= char <= "\u064a" for char in text)

    switches = set()
    for record in Writer(TOPICS, COMMON, seed=5).records(300):
        replies = [arabic(turn["value"]) for turn in record["conversations"] if turn["from"] == "gpt"]
        switches |= set(pairwise(replies))
    assert {(True, False), (False, True)} <= switches


def test_records_alternate() -> None:
    for record in Writer(TOPICS, COMMON, seed=6).records(100):
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)


def test_every_directive_is_among_the_requests_that_are_trained_on() -> None:
    for language, directive in DIRECTIVES.items():
        assert directive in COMMON.requests.to(language)
