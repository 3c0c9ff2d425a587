"""Who is served: tenants with their keys, weights and quotas, read from a YAML file.

    tenants:
      - name: team-a
        keys: ["sha256:4f0c..."]   # of each key its hash, as `slimserve tenants new team-a` prints it
        weight: 2                  # of tenants that compete, this one gets twice as much
        requests_per_minute: 600
        tokens_per_minute: 100000
        max_concurrent: 32
        max_priority: high         # default normal

The keys themselves are nowhere: who reads the file cannot act as a tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.errors import UsageError
from server.worker.wire import Priority

MAX_TENANTS = 1000
MAX_FILE = 4 << 20
"""Bytes."""
SHORTEST_KEY = 20
"""Characters. A key is stored as a plain hash, which hides only what cannot be guessed."""
_KEY_BYTES = 32
_HASH = "sha256:"
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
"""From the first served to the last."""


class TenantEntry(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,63}$")]
    keys: Annotated[list[Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]], Field(min_length=1, max_length=16)]
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=10_000_000_000)] | None = None
    max_concurrent: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_priority: Priority = "normal"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tenants: Annotated[list[TenantEntry], Field(max_length=MAX_TENANTS)]

    @field_validator("tenants")
    @classmethod
    def _names_and_keys_differ(cls, entries: list[TenantEntry]) -> list[TenantEntry]:
        names = [entry.name for entry in entries]
        keys = [key for entry in entries for key in entry.keys]
        if len(set(names)) < len(names):
            raise ValueError("two tenants have the same name")
        if len(set(keys)) < len(keys):
            raise ValueError("a key is listed twice")
        return entries


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is. The nameless one is everybody where no tenants are set, and the holder of the API key."""

    name: str = ""
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_priority: Priority = "high"

    def may_ask_for(self, priority: Priority) -> bool:
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.max_priority)


NOBODY = Tenant()


class TenantTable:
    """Finds the tenant of a key. With neither tenants nor ``api_keys`` it is open: everybody is ``NOBODY``."""

    def __init__(
        self, entries: Iterable[TenantEntry] = (), api_keys: Iterable[str] = (), admin_key: str | None = None
    ) -> None:
        """``api_keys`` belong to ``NOBODY``, who has no quota. ``admin_key`` opens all routes and closes none."""
        # The digest is hashed with a secret before it is looked up: how long a dict takes tells nothing about a key.
        self._blind = secrets.token_bytes(_KEY_BYTES)
        self._by_digest = {self._blinded(hashlib.sha256(key.encode()).digest()): NOBODY for key in api_keys}
        self._admin = None if admin_key is None else hashlib.sha256(admin_key.encode()).digest()
        self.names: list[str] = []
        for entry in entries:
            tenant = Tenant(**entry.model_dump(exclude={"keys"}))
            self.names.append(tenant.name)
            self._by_digest |= {self._blinded(bytes.fromhex(key.removeprefix(_HASH))): tenant for key in entry.keys}

    @property
    def open(self) -> bool:
        """No key is needed."""
        return not self._by_digest

    @property
    def has_admin(self) -> bool:
        return self._admin is not None

    def is_admin(self, key: bytes) -> bool:
        return self._admin is not None and hmac.compare_digest(hashlib.sha256(key).digest(), self._admin)

    def find(self, key: bytes) -> Tenant | None:
        """None for an unknown key."""
        return NOBODY if self.open else self._by_digest.get(self._blinded(hashlib.sha256(key).digest()))

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")


def read_tenants(path: Path) -> list[TenantEntry]:
    """Raises UsageError that names the entry and what is wrong with it."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise UsageError(f"tenants: {path} is larger than {MAX_FILE} bytes")
        return _File.model_validate(yaml.safe_load(path.read_text())).tenants
    except OSError as error:
        raise UsageError(f"tenants: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UsageError(f"tenants: {path} is no YAML file") from None
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in detail["loc"]) or "the file"
        raise UsageError(f"tenants: {path}: {key}: {detail['msg'].removeprefix('Value error, ')}") from None


def new_key() -> str:
    """A key that nobody can guess."""
    return f"slim-{secrets.token_urlsafe(_KEY_BYTES)}"


def hash_key(key: str) -> str:
    """What the file holds. Raises UsageError for a key that could be guessed from its hash."""
    if len(key) < SHORTEST_KEY:
        raise UsageError(f"a key needs at least {SHORTEST_KEY} characters; `slimserve tenants new` makes one")
    return _HASH + hashlib.sha256(key.encode()).hexdigest()
