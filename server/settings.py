"""One checked, frozen object with everything that can be configured; `BIMEDIX_*` in the environment, flags over it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

EMBEDDED_CHECKPOINT = Path(__file__).parent / "embedded"


class ApiKey:
    """A named key, kept as a digest so that the key itself is not lying around in memory or in a repr."""

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self.digest = hashlib.sha256(key.encode()).digest()

    def matches(self, key: str) -> bool:
        """Compare in constant time: digests have one length, whatever was sent."""
        return hmac.compare_digest(self.digest, hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def parse_keys(lines: list[str]) -> tuple[ApiKey, ...]:
    """`name:key` entries to keys. Raises ValueError for an entry without a name, a short key, or a repeated name."""
    keys = []
    for number, line in enumerate(lines, 1):
        name, colon, key = line.strip().partition(":")
        if not (name and colon and len(key) >= 16 and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"API key {number}: expected NAME:KEY with a key of at least 16 visible ASCII characters "
                "(make one with: openssl rand -hex 24)"
            )
        keys.append(ApiKey(name, key))
    names = [key.name for key in keys]
    if len(set(names)) != len(names):
        raise ValueError("API key names repeat")
    return tuple(keys)


DURATION = re.compile(r"(\d+)([smhd])")


def seconds(duration: str) -> float:
    """`90s`, `30m`, `12h` or `30d` in seconds. Raises ValueError."""
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError("a duration reads 90s, 30m, 12h or 30d")
    return int(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


Duration = Annotated[float, BeforeValidator(lambda value: seconds(value) if isinstance(value, str) else value)]


class Settings(BaseSettings):
    """Configuration of one service process. Unknown names and impossible combinations raise ValueError."""

    model_config = SettingsConfigDict(
        env_prefix="BIMEDIX_", frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    model: str = Field(
        default=str(EMBEDDED_CHECKPOINT),
        description="Checkpoint directory or hub id; without one, the embedded demonstration model.",
    )
    served_model_name: str = Field(default="bimedix", description="The name that requests use.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="NAME:KEY entries, separated by commas."
    )
    api_key_file: Path | None = Field(default=None, description="File with a NAME:KEY a line; or set BIMEDIX_API_KEYS.")
    allow_anonymous: bool = Field(default=False, description="Listen beyond this machine without keys.")
    store: str | None = Field(
        default=None,
        repr=False,
        description="URL of the conversation store (sqlite or postgresql); without one, a file of the user's.",
    )
    conversation_ttl: Duration | None = Field(
        default=None,
        gt=0,
        description="How long conversations are kept after their last turn: 90s, 30m, 12h, 30d; without one, for good.",
    )
    language_policy: Literal["off", "guide", "guard"] = Field(
        default="guide", description="off, guide or guard: how the reply's language is kept."
    )
    checkpoints: Path | None = Field(
        default=None, description="Directory of checkpoints that can be activated while the service runs."
    )
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="NAME:KEY entries, separated by commas, for /admin."
    )
    admin_key_file: Path | None = Field(
        default=None, description="File with a NAME:KEY a line for /admin; or set BIMEDIX_ADMIN_KEYS."
    )
    adapters: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="NAME=DIR of a LoRA adapter to serve beside the model under that name; on experts, GPU only.",
    )
    canaries: Path | None = Field(
        default=None, description="YAML file of prompts and limits that a new checkpoint must pass; by default our own."
    )
    activation_drain_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="How long an activation waits for running replies to finish."
    )
    activations_at_once: int = Field(
        default=1, ge=1, description="How many replicas may change their checkpoint at the same time."
    )
    max_body_bytes: int = Field(default=2_000_000, ge=1_000, description="Largest request body, in bytes.")
    drain_seconds: float = Field(default=30.0, ge=0, le=3600, description="How long SIGTERM waits for running replies.")
    engine_flags: tuple[str, ...] = Field(default=(), description="vLLM engine flags, as on its command line.")

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _path_exists(cls, value: str) -> str:
        if value.startswith(("/", ".", "~")) and not Path(value).expanduser().is_dir():
            raise ValueError(f"there is no checkpoint directory {value}")
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @model_validator(mode="after")
    def _reachable_only_with_keys(self) -> Settings:
        keys = self.keys
        if not keys and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"refusing to listen on {self.host} without API keys: anyone who reaches it could use it. "
                "Set BIMEDIX_API_KEYS or --api-key-file, keep --host 127.0.0.1, or pass --allow-anonymous."
            )
        return self

    @model_validator(mode="after")
    def _administered(self) -> Settings:
        administrators = self.administrators
        if administrators and self.checkpoints is None and not self.takes_adapters:
            raise ValueError(
                "admin keys are for activating checkpoints and for adapters: name a directory with --checkpoints, or "
                "an --adapter"
            )
        if {key.digest for key in administrators} & {key.digest for key in self.keys}:
            raise ValueError("an admin key is also an API key: make another (openssl rand -hex 24)")
        return self

    @model_validator(mode="after")
    def _adapters_stay_with_their_base(self) -> Settings:
        if self.takes_adapters and self.checkpoints is not None:
            raise ValueError("adapters belong to one base: serve them without --checkpoints")
        return self

    @field_validator("adapters", mode="before")
    @classmethod
    def _split_adapters(cls, value: object) -> object:
        return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("checkpoints")
    @classmethod
    def _registry_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"there is no directory {value}")
        return value

    @property
    def takes_adapters(self) -> bool:
        """Whether vLLM is to apply adapters at run time: those of `adapters`, and what administrators add."""
        return bool(self.adapters) or "--enable-lora" in self.engine_flags

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """The API keys of both sources. Raises ValueError when the file cannot be read or an entry is malformed."""
        return _keys(self.api_keys, self.api_key_file)

    @property
    def administrators(self) -> tuple[ApiKey, ...]:
        """The admin keys, likewise."""
        return _keys(self.admin_keys, self.admin_key_file)


def _keys(entries: tuple[SecretStr, ...], file: Path | None) -> tuple[ApiKey, ...]:
    lines = [entry.get_secret_value() for entry in entries]
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the API key file {file}: {error}") from None
        found = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ValueError(f"the API key file {file} names no key")
        lines += found
    return parse_keys(lines)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
