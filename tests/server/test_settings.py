"""Configuration: checked at once, keys never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.auth import identify
from server.settings import Settings, is_loopback, parse_keys

KEY = "0123456789abcdef"


def test_environment_sets_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMEDIX_PORT", "8123")
    monkeypatch.setenv("BIMEDIX_API_KEYS", f"a:{KEY},b:{KEY}x")
    settings = Settings()
    assert settings.port == 8123
    assert [key.name for key in settings.keys] == ["a", "b"]


def test_settings_are_frozen_and_know_their_names() -> None:
    with pytest.raises(ValidationError):
        Settings(prot=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_machines_are_served_only_with_keys_or_on_purpose(host: str) -> None:
    with pytest.raises(ValidationError, match="without API keys"):
        Settings(host=host)
    assert Settings(host=host, allow_anonymous=True).host == host
    assert Settings(host=host, api_keys=f"a:{KEY}").host == host  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "entry", ["nokey", ":0123456789abcdef", "short:123", "space:0123456789 abcdef", "ä:пароль-пароль-пароль"]
)
def test_malformed_keys_are_refused_without_showing_them(entry: str) -> None:
    with pytest.raises(ValueError, match="API key 1") as refused:
        parse_keys([entry])
    assert entry.partition(":")[2] == "" or entry.partition(":")[2] not in str(refused.value)


def test_key_names_may_not_repeat() -> None:
    with pytest.raises(ValueError, match="repeat"):
        parse_keys([f"a:{KEY}", f"a:{KEY}x"])


def test_keys_are_not_in_the_repr() -> None:
    settings = Settings(api_keys=f"a:{KEY}")  # type: ignore[arg-type]
    assert KEY not in repr(settings) + repr(settings.keys)


def test_empty_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ValidationError, match="names no key"):
        Settings(api_key_file=tmp_path / "keys")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"Bearer {KEY}", "a"),
        (f"bearer {KEY}", "a"),
        (f"Bearer {KEY}x", "b"),
        (f"Basic {KEY}", None),
        (KEY, None),
        (f"Bearer {KEY} ", None),
        ("Bearer ", None),
        ("", None),
        (None, None),
        ("Bearer \udcff", None),
    ],
)
def test_identify(header: str | None, name: str | None) -> None:
    assert identify(parse_keys([f"a:{KEY}", f"b:{KEY}x"]), header) == name
