import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.language.score import PassRates, Verdict, judge, observed_language, pass_rates, score_jsonl

AR, EN = "يجب عليك شرب الماء والراحة لعدة أيام.", "You should drink water and rest for several days."

OBSERVED = [
    (EN, "en"),
    (AR, "ar"),
    ("نعم", "ar"),
    ("Yes.", "en"),
    (f"{AR}\n{EN}", "mixed"),
    ("تناول Panadol 500 mg مرتين يوميا بعد الأكل", "ar"),
    ("خذ paracetamol أو ibuprofen", "ar"),
    ("HbA1c أعلى من 7%", "ar"),
    ("The Arabic word صداع means headache in English.", "en"),
    ("", "none"),
    ("😀 120/80\n\n---", "none"),
    ("Vous devriez boire de l'eau et vous reposer pendant quelques jours.", "none"),
    ("شما باید آب بنوشید و چند روز استراحت کنید.", "none"),
    ("您应该多喝水，休息几天。", "none"),
]

VERDICTS = [
    (AR, "ar", (True, True)),
    (AR, "en", (False, None)),
    (EN, "en", (True, True)),
    (EN, "ar", (False, None)),
    ("😀", "ar", (None, None)),
    (f"{AR}\n\n1. 💊\n{AR}", "ar", (True, True)),
    (f"{AR}\n{EN}", "ar", (False, None)),
    # Under five words: not judged beside longer lines.
    (f"{AR}\nDose:\n{AR}", "ar", (True, True)),
    ("تناول Panadol 500 mg مرتين يوميا بعد الأكل مع كوب ماء", "ar", (True, True)),
    ("تشخيصك هو ارتفاع ضغط الدم (high blood pressure) وعلاجه بسيط", "ar", (True, True)),
    ("نتيجة فحص MRI و CT طبيعية ولا تحتاج إلى علاج", "ar", (True, True)),
    ("يجب عليك drink الماء كل يوم بعد الأكل وقبل النوم", "ar", (True, False)),
    ("اسم المرض acute myeloid leukemia relapse وهو مرض خطير يصيب الدم ونخاع العظم", "ar", (True, False)),
    ("يجب عليك شرب 水 الماء كل يوم بعد الأكل", "ar", (True, False)),
    ("You should drink ماء every day after you eat.", "en", (True, False)),
    ('The word "صداع" means headache in the English language.', "en", (True, True)),
    ("راجع https://example.org/what-is-the-best-treatment-for-you الآن للمزيد من المعلومات", "ar", (True, True)),
]


@pytest.mark.parametrize(("text", "language"), OBSERVED)
def test_observed_language(text: str, language: str) -> None:
    assert observed_language(text) == language


@pytest.mark.parametrize(("reply", "expected", "verdict"), VERDICTS)
def test_judge(reply: str, expected: str, verdict: tuple[bool | None, bool | None]) -> None:
    assert judge(reply, expected) == verdict  # type: ignore[arg-type]


@given(st.text(st.characters(codec=None)), st.sampled_from(["en", "ar"]))
def test_no_reply_raises_and_both_views_agree(reply: str, expected: str) -> None:
    verdict = judge(reply, expected)  # type: ignore[arg-type]
    assert (verdict.lines is True) == (observed_language(reply) == expected)
    assert verdict.words is None or verdict.lines


def test_pass_rates_leave_out_what_could_not_be_judged() -> None:
    rates = pass_rates([Verdict(True, True), Verdict(True, False), Verdict(False, None), Verdict(None, None)])
    assert rates == PassRates(replies=4, judged=3, passed_lines=2, passed_words=1)
    assert rates.line_level == pytest.approx(2 / 3)
    assert rates.word_level == pytest.approx(1 / 2)
    assert (PassRates().line_level, PassRates().word_level) == (1.0, 1.0)


def test_score_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    rows = [{"expected": "ar", "reply": AR}, {"expected": "ar", "reply": EN}, {"expected": "en", "reply": EN, "id": 3}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    rates = score_jsonl(path)
    assert rates["ar"] == PassRates(2, 2, 1, 1)
    assert rates["en"] == PassRates(1, 1, 1, 1)


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"reply": "x"}', '{"expected": "fr", "reply": "x"}', '{"expected": "en", "reply": 1}']
)
def test_score_jsonl_names_the_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"expected": "en", "reply": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"replies\.jsonl:2"):
        score_jsonl(path)


@pytest.mark.parametrize("unit", ["(", "“", "[", "`", "a", "عر", "水", "a-", "x ", "\n"])
def test_no_reply_makes_it_slow(unit: str) -> None:
    start = time.thread_time()
    judge((unit * 30_000)[:30_000], "ar")
    assert time.thread_time() - start < 1
