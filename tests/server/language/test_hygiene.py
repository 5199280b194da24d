import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.language.hygiene import clean

WILD = st.text(
    st.one_of(
        st.sampled_from("aé e\u0301 ا\u0651ةکی कि ﻻﻋﷺ\ufe71 0123 ٣۴ ²⅓① 👩🏽🇦🇪❤#\ufe0f\ufe0e\ufe00"),
        st.sampled_from("\u200b\u200c\u200d\u200e\u200f\u061c\u202a\u202e\u2066\u2069\u00ad\ufeff\u034f\u2060"),
        st.sampled_from(
            "\x00\x07\x0b\r\n\t\x7f\x85\x9f\U000e0041\U000e007f\U000e0101\ud800\udfff\u1100\u1161\u0f71\u0f72"
        ),
        st.characters(codec=None),
    ),
    max_size=80,
)

CLEANED = [
    ("plain text", "plain text", {}),
    ("عندي صُداع ١٤٠/٩٠ 🤒", "عندي صُداع ١٤٠/٩٠ 🤒", {}),
    ("cafe\u0301", "café", {"composed": 1}),
    ("ﻋﻨﺪﻱ", "عندي", {"presentation_forms": 4}),
    ("ﻻ", "لا", {"presentation_forms": 1}),
    ("x² ½ ① ﬁ ５", "x² ½ ① ﬁ ５", {}),
    ("a\u202eb\u202c\u2066c\u2069", "abc", {"bidi": 4}),
    ("a\U000e0041\U000e007fb", "ab", {"tags": 2}),
    ("a\u200bb\u00adc\ufeff", "abc", {"zero_width": 3}),
    ("\u200fعربي\u200e", "عربي", {"zero_width": 2}),
    ("می\u200cخواهم", "می\u200cخواهم", {}),
    ("क्\u200dष", "क्\u200dष", {}),
    ("a\u200db", "ab", {"zero_width": 1}),
    ("👩\u200d⚕\ufe0f", "👩\u200d⚕\ufe0f", {}),
    ("👨🏽\u200d👩🏽", "👨🏽\u200d👩🏽", {}),
    ("1\ufe0f\u20e3", "1\ufe0f\u20e3", {}),
    ("a\ufe0fb", "ab", {"zero_width": 1}),
    ("a\x00b\x1b[0m\tc\n", "ab[0m\tc\n", {"controls": 2}),
    ("a\r\nb\rc\x85d", "a\nb\nc\nd", {"line_breaks": 3}),
    ("a\ud800b", "a\ufffdb", {"surrogates": 1}),
    ("", "", {}),
]


@pytest.mark.parametrize(("text", "cleaned", "counts"), CLEANED)
def test_clean(text: str, cleaned: str, counts: dict[str, int]) -> None:
    assert clean(text) == (cleaned, counts)


@settings(max_examples=500)
@given(WILD)
def test_is_idempotent_and_reports_nothing_the_second_time(text: str) -> None:
    once = clean(text).text
    again = clean(once)
    assert again.text == once
    assert not +again.counts


@settings(max_examples=500)
@given(WILD)
def test_leaves_canonical_encodable_visible_text(text: str) -> None:
    cleaned = clean(text).text
    cleaned.encode()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not set(cleaned) & set("\x00\r\u202e\u2066\u200b\u200f\ufeff\U000e0041")


@settings(max_examples=500)
@given(WILD)
def test_digits_are_never_altered(text: str) -> None:
    assert _numbers(clean(text).text) == _numbers(text)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_ordinary_text_is_untouched(text: str) -> None:
    assert clean(text) == (text, {})


def test_counts_hold_kinds_and_numbers_only() -> None:
    counts = clean("my secret\u202e \u200bname\x00").counts
    assert counts == {"bidi": 1, "zero_width": 1, "controls": 1}


def test_time_is_linear_in_a_run_of_combining_marks() -> None:
    # NFC alone needs minutes for this text.
    text = "a" + "\u0301\u0323" * 200_000
    start = time.thread_time()
    cleaned = clean(text)
    assert time.thread_time() - start < 2
    assert len(cleaned.text) <= 31
    assert cleaned.counts["stacked_marks"] == 1


def _numbers(text: str) -> list[str]:
    return [character for character in text if character.isnumeric()]
