"""This service's own metrics, and the middleware that counts requests. Labels never hold text or ids."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.language.hygiene import Cleaned

REQUESTS = Counter("bimedix_requests_total", "HTTP requests answered.", ["route", "status"])
REPLY_LANGUAGES = Counter(
    "bimedix_reply_language_total", "Replies by the language chosen and the language seen.", ["expected", "observed"]
)
CLEANED = Counter("bimedix_cleaned_total", "Characters that hygiene changed in what users sent, by kind.", ["kind"])
SECONDS = Histogram(
    "bimedix_request_seconds",
    "Seconds from a request's arrival to its last byte.",
    ["route"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120),
)
TURNS = Counter(
    "bimedix_turns_total",
    "Turns by how they ended: complete, incomplete (token limit), interrupted, failed, replayed (idempotency key).",
    ["ending"],
)
DROPPED_TURNS = Counter("bimedix_dropped_turns_total", "Turns that no longer fitted into their conversation's prompt.")
STORE_SECONDS = Histogram(
    "bimedix_store_seconds",
    "Seconds to begin and to commit a turn, without the wait for an earlier one.",
    ["step"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
)


def count_cleaned(texts: Iterable[Cleaned]) -> None:
    """Note what hygiene changed: kinds and numbers, never the text."""
    for cleaned in texts:
        for kind, changed in cleaned.counts.items():
            CLEANED.labels(kind).inc(changed)


ACTIVATIONS = Counter("bimedix_activations_total", "Checkpoint activations in this replica, by result.", ["result"])
ACTIVATION_SECONDS = Histogram(
    "bimedix_activation_seconds",
    "Seconds of each phase of an activation.",
    ["phase"],
    buckets=(0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600),
)
WAITING = Gauge("bimedix_waiting_requests", "Generations that wait for a checkpoint to be activated.")


class CountRequests:
    """Plain ASGI, so that streams pass through untouched and a client's disconnect reaches the route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            # The route's template, never the path: paths hold ids, and anything else that callers make up.
            route = getattr(scope.get("route"), "path", "none")
            REQUESTS.labels(route, str(status)).inc()
            SECONDS.labels(route).observe(time.perf_counter() - began)
