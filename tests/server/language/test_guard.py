"""The guard's rules, by forced and by simulated decoding, with the real Mixtral vocabulary and the embedded one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.language import Language
from server.language.guard import CODES, CREDIT, LONGEST_WORD, UNGUARDED, Guard, Tables, first_refused
from server.language.token_classes import Script, script
from server.language.trial import REPLIES, allowed_terms


def refused(tokenizer: Any, tables: Tables, language: Language, reply: str) -> str | None:
    """What is left of `reply` from the first token on that the guard would not have let come."""
    tokens = tokenizer.encode(f" {reply}{tokenizer.eos_token}", add_special_tokens=False)
    index = first_refused(tables, language, tokens)
    return None if index is None else str(tokenizer.decode(tokens[index:], skip_special_tokens=True)).strip()


PASSING = [
    ("ar", REPLIES["ar"]),
    ("en", REPLIES["en"]),
    ("ar", "تناول Panadol 500 mg مرتين يوميا."),
    ("ar", "نعم، يمكنك أخذ amoxicillin/clavulanic acid مع الطعام."),
    ("ar", "مسؤول الرعاية يقيس HbA1c كل ٣ أشهر، والهدف أقل من ٧٪."),
    ("ar", "مثل Panadol و Brufen و Voltaren."),
    ("ar", "الخطوات:\n1. اشرب الماء.\n2. خذ باراسيتامول (Paracetamol).\n\n- استرح 😀"),
    ("ar", "ضغطك 140/90 mmHg مرتفع قليلا."),
    ("ar", "مرض Ménière يسبب الدوار."),
    ("en", 'The Arabic word for headache is "صداع" in most countries.'),
    ("en", "Black seed (حبة البركة) is a herb."),
    ("ar", "الصداع (headache) شائع."),
    ("en", "1. Rest.\n2. Drink water (2 L/day), about 8-10 cups: 250 mL each.\n"),
    ("en", "Interferon-β and α-blockers; temperature ≥ 38 °C."),
    ("en", "120/80."),
]
REFUSED = [
    ("ar", "You should rest.", "You should rest."),
    ("ar", "استرح.\nYou should rest.", "You should rest."),
    ("ar", "استرح.\n- Panadol", "Panadol"),
    ("en", "ارتح قليلا.", "ارتح قليلا."),
    ("ar", "تناول Panadol every six hours until it goes", "hours until it goes"),
    ("en", "The word for headache is صداع here.", "صداع here."),
    ("en", "It is (see above) صداع here.", "صداع here."),
    ("ar", "نعم 你好", "你好"),
    ("en", "Yes, привет", "привет"),
    ("ar", "نعم ｈｉ", "ｈｉ"),
]


@pytest.mark.parametrize(("language", "reply"), PASSING)
def test_replies_that_pass(tokenizer: Any, tables: Tables, language: Language, reply: str) -> None:
    assert refused(tokenizer, tables, language, reply) is None


@pytest.mark.parametrize(("language", "reply", "rest"), REFUSED)
def test_replies_that_drift_are_stopped_where_they_do(
    tokenizer: Any, tables: Tables, language: Language, reply: str, rest: str
) -> None:
    left = refused(tokenizer, tables, language, reply)
    # Broken characters where the first refused token is one byte of several.
    assert left is not None
    assert rest.endswith(left.lstrip("\ufffd"))
    assert len(left) >= len(rest) - 2


def test_terms_may_be_named_in_arabic(tokenizer: Any) -> None:
    terms = allowed_terms(tokenizer)
    assert len(terms) >= 60
    assert sum(terms.values()) / len(terms) >= 0.95, [term for term, allowed in terms.items() if not allowed]


def allowed(guard: Guard, slot: int = 0) -> torch.Tensor:
    return guard.mask(torch.tensor([slot]), torch.zeros(1, guard.tables.bias.shape[1]))[0] == 0


def begun(tables: Tables, language: Language) -> Guard:
    guard = Guard(tables, 1)
    guard.begin([0], [CODES[language]])
    return guard


def feed(guard: Guard, tokens: list[int]) -> None:
    for token in tokens:
        guard.advance(torch.tensor([0]), torch.tensor([token]))


@pytest.mark.parametrize("language", ["en", "ar"])
def test_the_end_may_come_once_something_was_said(tokenizer: Any, tables: Tables, language: Language) -> None:
    guard = begun(tables, language)
    assert not allowed(guard)[tokenizer.eos_token_id]
    feed(guard, tokenizer.encode(" 5", add_special_tokens=False))
    assert allowed(guard)[tokenizer.eos_token_id]


def test_a_character_in_bytes_is_finished_before_anything_else(tokenizer: Any, tables: Tables) -> None:
    guard = begun(tables, "ar")
    lead, last = tokenizer.convert_tokens_to_ids(["<0xD9>", "<0xA5>"])  # ٥
    feed(guard, [lead])
    assert allowed(guard)[last]
    assert not allowed(guard)[tokenizer.eos_token_id]
    assert not allowed(guard)[lead]
    feed(guard, [last])
    assert allowed(guard)[tokenizer.eos_token_id]


def test_a_word_that_has_begun_may_be_finished_but_not_for_ever(tokenizer: Any, tables: Tables) -> None:
    guard = begun(tables, "ar")
    feed(guard, tokenizer.encode(" تناول", add_special_tokens=False))
    letter = tokenizer.convert_tokens_to_ids("x")
    came = 0
    while allowed(guard)[letter] and came < 100:
        feed(guard, [letter])
        came += 1
    assert came == 24


def test_signs_are_no_way_out(tokenizer: Any, tables: Tables) -> None:
    guard = begun(tables, "ar")
    dash = tokenizer.convert_tokens_to_ids("-")
    came = 0
    while allowed(guard)[dash] and came < 100:
        feed(guard, [dash])
        came += 1
    assert came == 12
    assert allowed(guard)[tokenizer.convert_tokens_to_ids("ا")]


def test_an_unguarded_slot_is_free(tables: Tables) -> None:
    guard = Guard(tables, 2)
    guard.begin([1], [UNGUARDED])
    assert allowed(guard, 0).all() and allowed(guard, 1).all()


@settings(max_examples=10)
@given(language=st.sampled_from(["en", "ar"]), seed=st.integers(0, 2**32))
def test_a_model_that_always_wants_the_other_language_can_not_have_it(
    tokenizer: Any, tables: Tables, language: Language, seed: int
) -> None:
    """Some token may always come, and whatever comes keeps to the bounds. Letters stand for the tokens' own count."""
    other: Language = "ar" if language == "en" else "en"
    wanted = sorted(set(tokenizer.encode(f" {REPLIES[other]} 5 - 3\n. ( )", add_special_tokens=False)))
    random = torch.Generator().manual_seed(seed)
    guard, slot, tokens = begun(tables, language), torch.tensor([0]), []
    logits = torch.full((1, tables.bias.shape[1]), -4.0)
    logits[0, wanted] = 6.0
    logits[0, tokenizer.eos_token_id] = -100.0
    for _ in range(150):
        chances = guard.mask(slot, logits.clone()).softmax(1)
        assert not chances.isnan().any()
        tokens.append(int(torch.multinomial(chances, 1, generator=random)))
        guard.advance(slot, torch.tensor(tokens[-1:]))
    text = tokenizer.decode(tokens)
    assert not set(map(script, text.rstrip("\ufffd"))) & {Script.NEVER}
    own, foreign = (Script.LATIN, Script.ARABIC) if language == "en" else (Script.ARABIC, Script.LATIN)
    letters = [[kind for kind in map(script, line) if kind in (own, foreign)] for line in text.splitlines()]
    assert all(line[:3] == [own] * len(line[:3]) for line in letters), text
    counts = Counter(kind for line in letters for kind in line)
    assert counts[foreign] <= counts[own] + CREDIT + LONGEST_WORD, text


def test_replies_side_by_side_do_not_mix(tokenizer: Any, tables: Tables) -> None:
    guard = Guard(tables, 3)
    guard.begin([0, 1, 2], [CODES["ar"], CODES["en"], UNGUARDED])
    arabic, english = (tokenizer.encode(f" {text}", add_special_tokens=False) for text in ("تناول", "Take"))
    for a, e in zip(arabic[-1:], english[-1:], strict=True):
        guard.advance(torch.tensor([1, 0]), torch.tensor([e, a]))
    assert guard.state[0, 0] == CODES["ar"] and guard.state[1, 0] == CODES["en"] and guard.state[2, 0] == UNGUARDED
    logits = guard.mask(torch.tensor([2, 1, 0]), torch.zeros(3, tables.bias.shape[1]))
    assert (logits[0] == 0).all()
    assert logits[1, english[0]] == 0 and logits[2, arabic[0]] == 0


def test_a_token_that_is_not_fresh_changes_nothing(tokenizer: Any, tables: Tables) -> None:
    guard = begun(tables, "ar")
    before = guard.state.clone()
    letter = tokenizer.convert_tokens_to_ids("ا")
    guard.advance(torch.tensor([0]), torch.tensor([letter]), torch.tensor([False]))
    assert torch.equal(guard.state, before)
