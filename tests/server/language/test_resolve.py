import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.language.detect import detect
from server.language.hygiene import clean
from server.language.resolve import load, resolve

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parents[3]

WILD = st.text(
    st.one_of(
        st.sampled_from("abcI have 3andi 7 عندي صداع ما هو؟ ؟?.:\"'«»()\n"),
        st.sampled_from("\u064b\u0651\u0640ﻋﻨٱکیہےەپ٣۴👩🏽🇦🇪"),
        st.sampled_from("\u200b\u200c\u200d\u200f\u202a\u202e\u2066\u2069\ufeff\x00\ud800\U000e0041"),
        st.characters(codec=None),
    ),
    max_size=60,
)
PHRASES = st.sampled_from(
    [
        "answer in Arabic",
        "بالإنجليزي",
        "in English",
        "what is",
        "ما هو",
        "3andi",
        "الدكتور",
        "je suis",
        "است",
        '"',
        "only ",
        "MRI",
    ]
)
TEXTS = st.lists(st.one_of(WILD, PHRASES), max_size=6).map(" ".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}), max_size=5
)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


@pytest.mark.parametrize("case", read("tuned.jsonl"), ids=lambda case: case["rule"])
def test_every_case_the_rules_were_written_with(case: dict[str, Any]) -> None:
    assert resolve(case["messages"]) == case["expect"]


def test_cases_written_before_the_rules() -> None:
    cases = read("unseen.jsonl")
    wrong = [case for case in cases if resolve(case["messages"]) != case["expect"]]
    assert len(cases) >= 60
    assert 1 - len(wrong) / len(cases) >= 0.95, wrong


@pytest.mark.parametrize("requested", ["en", "ar"])
def test_the_calls_own_language_wins(requested: Any) -> None:
    assert resolve(user("رد بالعربي", "answer in English"), requested) == requested


def test_nothing_to_go_by_is_english() -> None:
    assert resolve([]) == "en"
    assert resolve([{"role": "system", "content": ""}]) == "en"


def test_a_reply_that_drifted_does_not_pull_the_conversation_along() -> None:
    greeting = {"role": "assistant", "content": "أهلا، كيف أساعدك؟"}
    drifted = {
        "role": "assistant",
        "content": "Metformin is a drug for type 2 diabetes. It lowers the sugar in your blood.",
    }
    assert resolve([greeting, *user("metformin"), drifted, *user("500 mg")]) == "ar"


def test_history_answers_as_it_did_when_it_was_the_latest_turn() -> None:
    history = user("عندي صداع", "ok", "What is the dose?", "metformin", "شكرا")
    assert [resolve(history[: n + 1]) for n in range(len(history))] == ["ar", "ar", "en", "en", "ar"]


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_never_raises_is_deterministic_and_blind_to_hygiene(messages: list[dict[str, str]]) -> None:
    cleaned = [{**message, "content": clean(message["content"]).text} for message in messages]
    assert resolve(messages) in ("en", "ar")
    assert resolve(messages) == resolve(messages) == resolve(cleaned)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, TEXTS)
def test_what_the_assistant_said_after_a_spoken_turn_does_not_matter(history: list[dict[str, str]], said: str) -> None:
    start = [*history, *user("عندي صداع")]
    assert resolve([*start, {"role": "assistant", "content": said}, *user("ok")]) == "ar"


@pytest.mark.parametrize(
    "unit", ["only ", "in Arabic ", "i want it have ", '"', "“", "((", " ", "a@", "3'a", "و", "پ ", "?", "بالعربي "]
)
def test_no_text_makes_it_slow(unit: str) -> None:
    load()
    start = time.thread_time()
    resolve(user((unit * 100_000)[:100_000]))
    assert time.thread_time() - start < 1


def test_langdetect_answers_the_same_in_every_process() -> None:
    texts = [
        "metformin",
        "CT scan",
        "I take metformin 500mg و عندي دوخة",
        "Kepala saya sakit sejak kemarin",
        "سردرد دارم",
    ]
    program = f"from server.language.detect import detect; print([detect(text) for text in {texts!r}])"
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert answers == {f"{[detect(text) for text in texts]}\n"}


def test_needs_neither_torch_nor_vllm() -> None:
    program = "import sys, server.language.resolve, server.language.score; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert done.stdout == "set()\n"
