"""How long resolving takes: `python -m server.language.benchmark` prints a table, then one JSON line.

"first" is a message not seen before, at the end of a conversation whose earlier turns were; "again" is a message seen
before, as in a retry. Times are microseconds for one call of `resolve` over the whole message list.
"""

import json
import statistics
import sys
import time

from server.language.resolve import load, resolve

_HISTORY = [
    {"role": "system", "content": "You are a medical assistant."},
    {"role": "user", "content": "I have had a cough for a week"},
    {"role": "assistant", "content": "I am sorry to hear that. Do you also have a fever?"},
]
_LATEST = {
    "English": "No fever, but my chest hurts when I breathe in. Should I see a doctor about it? ({})",
    "Arabic": "لا توجد حرارة، لكن صدري يؤلمني عندما أتنفس. هل يجب أن أراجع الطبيب؟ ({})",
    "mixed": "الدكتور وصف لي Augmentin 1g و Panadol، هل أقدر آخذهم مع بعض؟ ({})",
    "request": "What is diabetes and how is it treated? Please answer in Arabic. ({})",
    "Arabizi": "3andi soda3 w 7arara men embareh, shu lazem a3mel? ({})",
    "term": "Metformin 500 mg ({})",
    "French": "J'ai mal à la tête depuis deux jours, que dois-je faire ? ({})",
    "long English": "The pain started last week after I lifted a heavy box at work. " * 30 + "({})",
}


def main() -> None:
    load()
    if len(sys.argv) > 1:
        raise SystemExit("server.language.benchmark takes no arguments")
    results = {kind: _measure(template) for kind, template in _LATEST.items()}
    print(f"{'message':<14}{'first, median':>15}{'first, p99':>12}{'again, median':>15}   (microseconds)")
    for kind, row in results.items():
        print(f"{kind:<14}{row['first_median']:>15.1f}{row['first_p99']:>12.1f}{row['again_median']:>15.1f}")
    print(json.dumps({"benchmark": "language.resolve", "unit": "us", "results": results}))


def _measure(template: str, rounds: int = 1000) -> dict[str, float]:
    conversations = [[*_HISTORY, {"role": "user", "content": template.format(number)}] for number in range(rounds)]
    first = sorted(_microseconds(conversation) for conversation in conversations)
    again = [_microseconds(conversation) for conversation in conversations]
    return {
        "first_median": round(statistics.median(first), 2),
        "first_p99": round(first[rounds * 99 // 100], 2),
        "again_median": round(statistics.median(again), 2),
    }


def _microseconds(conversation: list[dict[str, str]]) -> float:
    start = time.perf_counter()
    resolve(conversation)
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    main()
