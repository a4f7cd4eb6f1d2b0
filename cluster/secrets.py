"""Keys of this installation, and the tokens that it hands out.

Keys are files under FORGEARR_HOME/keys, readable by their owner only and made on first use. Tokens are random; only
their hash is kept. What has to be told to others again, such as a password, is sealed before it goes into the database.
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
    """A secret was sealed with another key (auth.sealing_key, or keys/sealing in FORGEARR_HOME): set it anew."""

    status = 503
    error = "service_unavailable"
    code = "SEAL_BROKEN"


def signing_key() -> str:
    """The key that signs access tokens."""
    configured = get_settings().auth.signing_key
    return configured.get_secret_value() if configured else _read_or_create_key("signing")


def new_token(prefix: str) -> str:
    """A random credential that names its own sort, so that people and secret scanners recognise it."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def token_hash(token: str) -> str:
    """What is stored of a token. It has 256 random bits, so a plain hash cannot be searched back."""
    return hashlib.sha256(token.encode()).hexdigest()


def seal(secret: str) -> str:
    """A secret as it may lie in the database: of no use without the key, and not to be changed unseen."""
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
    # The key is random, whatever its length and letters: a hash makes the 32 bytes of it that are wanted.
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()))


def _read_or_create_key(name: str) -> str:
    path = home() / "keys" / name
    if not path.exists():
        _create_key(path)
    return path.read_text().strip()


def _create_key(path: Path) -> None:
    """Write a new key so that nobody ever sees half of it, and so that two first starts agree on one."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first: its key is the key
    finally:
        draft.unlink()
