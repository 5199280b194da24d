from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.latency.scripted import Running, Scripted


@pytest.fixture(scope="session")
def scripted_endpoint() -> Iterator[Scripted]:
    with Running() as endpoint:
        yield endpoint


@pytest.fixture
def scripted(scripted_endpoint: Scripted) -> Scripted:
    scripted_endpoint.reset()
    return scripted_endpoint
