"""The directive that asks the model for a language, put into the turns that need one.

A directive stands at the end of a user turn, never in the system line: what came before it keeps its token ids, so the
prefix cache still holds when the conversation's language changes. And it depends only on the messages up to its turn:
history renders next time as it did when it was new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from server.language import Language
from server.language.resolve import resolve
from server.language.score import observed_language

Use = Literal["always", "mismatch"]


class Directives(NamedTuple):
    """What asks a checkpoint for a language, by language, and whether every turn needs it or only those whose own
    language is another."""

    texts: Mapping[Language, str]
    use: Use


UNKNOWN_CHECKPOINT = Directives({"en": "(Answer in English.)", "ar": "(أجب باللغة العربية.)"}, "always")
"""For a checkpoint without a manifest: base Mixtral answers Arabic wholly in Arabic in about half of all cases."""

NO_DIRECTIVES = Directives({}, "mismatch")


def guide(
    messages: Sequence[Mapping[str, str]], requested: Literal["auto", "en", "ar"], directives: Directives
) -> tuple[list[dict[str, str]], Language]:
    """`messages` with their directives, and the language to answer in.

    `requested` holds for the last message only: what earlier calls asked for is not in the message list.
    """
    guided: list[dict[str, str]] = []
    language: Language = "en"
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            last = index == len(messages) - 1
            language = resolve(messages[: index + 1], requested if last else "auto")
            content = directed(content, language, directives)
        guided.append({"role": message["role"], "content": content})
    return guided, language


def directed(content: str, language: Language, directives: Directives) -> str:
    """`content` with the directive for `language`, where it needs one."""
    text = directives.texts.get(language)
    if text is None or (directives.use == "mismatch" and observed_language(content) == language):
        return content
    return f"{content} {text}"
