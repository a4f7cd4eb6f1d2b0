"""Keys of this installation, and the tokens that it hands out.

Keys are files under FORGEARR_HOME/keys, readable by their owner only and made on first use. Tokens are random; only
their hash is kept.
"""

import hashlib
import os
import secrets
from pathlib import Path

from cluster.settings import get_settings, home


def signing_key() -> str:
    """The key that signs access tokens."""
    configured = get_settings().auth.signing_key
    return configured.get_secret_value() if configured else _key("signing")


def new_token(prefix: str) -> str:
    """A random credential that names its own sort, so that people and secret scanners recognise it."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def token_hash(token: str) -> str:
    """What is stored of a token. It has 256 random bits, so a plain hash cannot be searched back."""
    return hashlib.sha256(token.encode()).hexdigest()


def _key(name: str) -> str:
    path = home() / "keys" / name
    if not path.exists():
        _create(path)
    return path.read_text().strip()


def _create(path: Path) -> None:
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
