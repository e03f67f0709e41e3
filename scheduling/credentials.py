"""API keys, `ps-<8 characters>-<secret>`, and tokens of the same form. Only the digest of a key is ever stored."""

import hashlib
import secrets
import string
from dataclasses import dataclass

PREFIX_CHARS = 8
SECRET_BYTES = 32
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key just made. `plaintext` goes to its owner and nowhere else."""

    plaintext: str
    prefix: str
    digest: str


def generate_key(kind: str = "ps") -> NewKey:
    """A key that begins with `kind`, from 256 random bits, so that a plain digest cannot be searched through."""
    prefix = "".join(secrets.choice(_ALPHABET) for _ in range(PREFIX_CHARS))
    plaintext = f"{kind}-{prefix}-{secrets.token_urlsafe(SECRET_BYTES)}"
    return NewKey(plaintext=plaintext, prefix=prefix, digest=digest_key(plaintext))


def digest_key(plaintext: str) -> str:
    """SHA-256 of a whole key, in hex."""
    return hashlib.sha256(plaintext.encode()).hexdigest()
