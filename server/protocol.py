"""HTTP/1.1 as uvicorn speaks it, with a bound on a request's head, and refusals in OpenAI's envelope."""

from __future__ import annotations

import json

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import envelope

MAX_HEAD_BYTES = 2**16
LINGER_SECONDS = 1.0
"""Closing at once, while a client still sends its overlong head, would reset the connection under the refusal."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Uvicorn's faster parser, which by itself keeps a head of any size in memory."""

    refused = False
    head_bytes = 0
    unparsed_bytes = 0
    """What came since the parser last told of something whole: a header, a piece of the body."""

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        self.unparsed_bytes += len(data)
        super().data_received(data)
        if self.unparsed_bytes > MAX_HEAD_BYTES and not self.refused:
            self.refuse(431, "The request's head is too large.")

    def on_message_begin(self) -> None:
        self.head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.unparsed_bytes = 0
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "The request's head is too large.")
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.unparsed_bytes = 0
        if not self.refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.unparsed_bytes = 0
        if not self.refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read."""
        self.refuse(400, "The request is not valid HTTP.")

    def refuse(self, status: int, message: str) -> None:
        """Answer, read no further, and close once the client has had time to read the answer."""
        if self.refused:
            return
        self.refused = True
        if self.cycle and not self.cycle.response_complete:
            # The bytes refused follow a request that is being answered, or are the rest of its body.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        body = json.dumps(envelope(status, message, code="invalid_http")).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
