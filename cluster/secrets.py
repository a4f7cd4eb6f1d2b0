"""The keys of this installation, the tokens that it issues, and the encryption of stored secrets.

Keys are files under FORGEARR_HOME/keys, readable by their owner only and created on first use. Tokens are random; only
their hash is stored. A secret that Forgearr must send to others, such as a service's password, is sealed (encrypted)
before it is stored in the database.
"""

import base64
import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ForgearrError
from cluster.settings import get_settings, home

if TYPE_CHECKING:
    from cryptography.fernet import Fernet


class SealBroken(ForgearrError):
    """A secret was sealed with another key (auth.sealing_key, or keys/sealing in FORGEARR_HOME); set it again."""

    status = 503
    error = "service_unavailable"
    code = "SEAL_BROKEN"


def signing_key() -> str:
    """Return the key that signs access tokens."""
    configured = get_settings().auth.signing_key
    return configured.get_secret_value() if configured else _read_or_create_key("signing")


def new_token(prefix: str) -> str:
    """Create a random token. People and secret scanners recognise its type by the prefix."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def token_hash(token: str) -> str:
    """Return the hash that is stored of a token. A plain hash is safe, because a token has 256 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


def seal(secret: str) -> str:
    """Encrypt and sign a secret for the database. Without the key it cannot be read, nor changed unnoticed."""
    return _fernet().encrypt(secret.encode()).decode()


def unseal(sealed: str) -> str:
    from cryptography.fernet import InvalidToken

    try:
        return _fernet().decrypt(sealed).decode()
    except InvalidToken:
        raise SealBroken from None


def _fernet() -> "Fernet":
    from cryptography.fernet import Fernet

    configured = get_settings().auth.sealing_key
    key = configured.get_secret_value() if configured else _read_or_create_key("sealing")
    # The key may have any length and characters. Its hash has the 32 bytes that Fernet needs.
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()))


def _read_or_create_key(name: str) -> str:
    path = home() / "keys" / name
    if not path.exists():
        _create_key(path)
    return path.read_text().strip()


def _create_key(path: Path) -> None:
    """Create a key file atomically. Two processes that create it at the same time use the same key."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first; its key is used
    finally:
        draft.unlink()
