"""`bimedix chat`: a conversation in the terminal with a running service."""

from __future__ import annotations

import openai
import typer
from openai.types.chat import ChatCompletionMessageParam


def converse(url: str, api_key: str, language: str) -> None:
    """Read messages from the terminal and stream the replies, until end of file."""
    client = openai.OpenAI(base_url=url.rstrip("/") + "/v1", api_key=api_key, max_retries=0)
    history: list[ChatCompletionMessageParam] = []
    try:
        model = client.models.list().data[0].id
    except openai.OpenAIError as error:
        typer.secho(
            f"bimedix: no service answers at {url} ({error}); start one with: bimedix serve", fg="red", err=True
        )
        raise typer.Exit(1) from None
    while (message := read_message()) is not None:
        if not message:
            history = []
            typer.secho("(new conversation)", dim=True)
            continue
        history.append({"role": "user", "content": message})
        try:
            history.append({"role": "assistant", "content": stream_reply(client, model, history, language)})
        except openai.OpenAIError as error:
            history.pop()
            typer.secho(str(error), fg="red", err=True)


def read_message() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def stream_reply(client: openai.OpenAI, model: str, history: list[ChatCompletionMessageParam], language: str) -> str:
    """Print the reply as it comes, and return it whole."""
    stream = client.chat.completions.create(
        model=model, messages=history, stream=True, extra_body={"language": language}
    )
    reply = ""
    for chunk in stream:
        delta = chunk.choices[0].delta.content or "" if chunk.choices else ""
        typer.echo(delta, nl=False)
        reply += delta
    typer.echo()
    return reply
