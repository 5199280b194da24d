"""What keeping the language costs: `python -m server.language.benchmark` prints a table, then one JSON line.

- Without arguments: how long resolving takes. "first" is a message not seen before, at the end of a conversation whose
  earlier turns were; "again" is a message seen before, as in a retry.
- `--guard`: what the guard adds to a decoding step, by batch size; with `--url`, as a share of a service's steps.
- `--prefix-cache`: how much of each prompt an 8-turn conversation has in common with its last turn, where the language
  switches twice and where it does not, for our directives and for one in the system message; with `--url`, also what
  the prefix cache of a running service says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from server.language.resolve import load, resolve

Table = list[dict[str, Any]]

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
    parser = argparse.ArgumentParser(prog="python -m server.language.benchmark", allow_abbrev=False)
    parser.add_argument("--guard", action="store_true", help="what the guard adds to a decoding step")
    parser.add_argument("--prefix-cache", action="store_true", help="what a change of language costs in the cache")
    parser.add_argument("--url", help="a running service, whose steps or whose prefix cache are measured too")
    given = parser.parse_args()
    if given.guard:
        from server.language.guard_benchmark import guard_steps

        _print("language.guard", guard_steps(given.url))
    elif given.prefix_cache:
        from server.language.prefix_benchmark import prefix_shares

        _print("language.prefix_cache", prefix_shares(given.url))
    else:
        load()
        _print("language.resolve", [{"message": kind, **_measure(text)} for kind, text in _LATEST.items()])


def _print(name: str, rows: Table) -> None:
    print("".join(f"{column:>22}" for column in rows[0]))
    for row in rows:
        print("".join(f"{value:>22}" for value in row.values()))
    print(json.dumps({"benchmark": name, "results": rows}))


def _measure(template: str, rounds: int = 1000) -> dict[str, float]:
    conversations = [[*_HISTORY, {"role": "user", "content": template.format(number)}] for number in range(rounds)]
    first = [_microseconds(lambda: resolve(conversation)) for conversation in conversations]  # noqa: B023
    again = [_microseconds(lambda: resolve(conversation)) for conversation in conversations]  # noqa: B023
    return {
        "first, median us": round(statistics.median(first), 2),
        "first, p99 us": round(sorted(first)[rounds * 99 // 100], 2),
        "again, median us": round(statistics.median(again), 2),
    }


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    main()
