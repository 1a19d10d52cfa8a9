"""What lets people in, and what is kept of it: argon2id of passwords, SHA-256 of tokens that nobody could guess. No torch."""

import hashlib
import hmac
import secrets
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from sae_core.errors import UsageError

if TYPE_CHECKING:
    from argon2 import PasswordHasher

SHORTEST, LONGEST = 10, 1000
"""Characters of a password."""
AT_ONCE = 2
"""Hashes made at a time: each takes 64 MiB for a moment, so many logins at once wait for one another."""


@lru_cache
def _hasher() -> "PasswordHasher":
    """argon2id with the parameters of RFC 9106 for little memory. Loaded by the first who needs it: most have no accounts."""
    from argon2 import PasswordHasher

    return PasswordHasher()


_turns = threading.BoundedSemaphore(AT_ONCE)


def hashed(password: str) -> str:
    """What is kept of a password; UsageError where it is too short to be one."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise UsageError(f"A password has {SHORTEST} to {LONGEST} characters; this one has {len(password)}.", field="password")
    with _turns:
        return _hasher().hash(password)


def is_right(password: str, kept: str | None) -> bool:
    """Whether it is the password of which `kept` was kept. Where there is none, it takes as long to say no."""
    from argon2.exceptions import InvalidHashError, VerificationError

    with _turns:
        try:
            return _hasher().verify(kept or _nobodys(), password[:LONGEST]) and kept is not None
        except (VerificationError, InvalidHashError):
            return False


def is_weak(kept: str) -> bool:
    """Whether it was kept with other parameters than today's."""
    return _hasher().check_needs_rehash(kept)


def new_token(prefix: str) -> str:
    """A token of 256 random bits; the prefix tells people and scanners of secrets what it is."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def digest(token: str) -> str:
    """What is kept of a token. It is random, so a plain hash is enough: nobody can try them all."""
    return hashlib.sha256(token.encode()).hexdigest()


def same(given: str, expected: str) -> bool:
    """Whether two tokens are one, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


@lru_cache
def _nobodys() -> str:
    return _hasher().hash(secrets.token_urlsafe(32))
