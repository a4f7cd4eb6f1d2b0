"""The keys of this installation, the tokens that it issues, and the encryption of stored secrets.

Keys are files under FORGEARR_HOME/keys, readable by their owner only and created on first use. Tokens are random; only
their hash is stored. A secret that Forgearr must send to others, such as a service's password, is sealed (encrypted)
before it is stored in the database.
"""

import base64
import hashlib
import os
import platform
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import durable
from cluster.errors import ForgearrError, Unavailable
from cluster.settings import MIN_KEY_LENGTH, NODE_SECRETS_VARIABLE, get_settings, home

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

MLFLOW_USER = "forgearr"


KEYS = {
    "signing": "everybody must log in again",
    "sealing": "the keys of services, the credentials of repositories and the secrets of webhooks must be set again",
    "mlflow": "MLflow's pages ask for the new password",
    "ray": "Ray's dashboard asks for the new token",
}
"""The names of the key files, and what it costs to have a new one."""


class KeyDamaged(Unavailable):
    """A key file of this installation is damaged."""

    code = "KEY_DAMAGED"
    retryable = False


class SealBroken(ForgearrError):
    """A secret was sealed with another key (auth.sealing_key, or keys/sealing in FORGEARR_HOME); set it again."""

    status = 503
    error = "service_unavailable"
    code = "SEAL_BROKEN"


class KeyMissing(ForgearrError):
    """A node of a cluster lacks a key of the installation."""

    code = "KEY_MISSING"


def signing_key() -> str:
    """Return the key that signs access tokens."""
    configured = get_settings().auth.signing_key
    return configured.get_secret_value() if configured else _read_or_create_key("signing")


def mlflow_password() -> str:
    """Return the password of MLFLOW_USER at the MLflow server of this installation."""
    return _read_or_create_key("mlflow")


def ray_token_path() -> Path:
    """Return the file with the token of this installation's Ray. Ray reads it in each process, so it is no variable."""
    return _key_path("ray")


def check_keys() -> None:
    """Raise KeyDamaged if a key file is not whole."""
    for name in KEYS:
        path = home() / "keys" / name
        if path.exists():
            _read_key(path)


def create_shared_keys() -> None:
    """Create the keys that all nodes must share, so that a node without them notices."""
    signing_key()
    _sealing_key()
    if get_settings().has_own_mlflow:
        mlflow_password()


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

    # The key may have any length and characters. Its hash has the 32 bytes that Fernet needs.
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(_sealing_key().encode()).digest()))


def _sealing_key() -> str:
    configured = get_settings().auth.sealing_key
    return configured.get_secret_value() if configured else _read_or_create_key("sealing")


def _read_or_create_key(name: str) -> str:
    return _read_key(_key_path(name))


def _key_path(name: str) -> Path:
    path = home() / "keys" / name
    if not path.exists():
        if NODE_SECRETS_VARIABLE in os.environ:
            raise KeyMissing(
                f"There is no {path} on this node ({platform.node()}). All nodes need the same keys: copy this folder "
                "from the node where `forgearr up` runs."
            )
        _create_key(path)
    return path


def _read_key(path: Path) -> str:
    """A key that is too short, as it may be after a power cut, is refused: others could guess it."""
    key = path.read_text().strip()
    if len(key) < MIN_KEY_LENGTH:
        raise KeyDamaged(
            f"The key file keys/{path.name} in FORGEARR_HOME is damaged: it has {len(key)} characters, and a key has "
            f"at least {MIN_KEY_LENGTH}. Restore it from a backup. Without one, delete it, and a new key is made; then "
            f"{KEYS[path.name]}."
        )
    return key


def _create_key(path: Path) -> None:
    """Create a key file atomically. Two processes that create it at the same time use the same key."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # only its owner can read it
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        durable.sync(Path(draft))
        os.link(draft, path)
        durable.sync(path.parent)
        durable.sync(path.parent.parent)
    except FileExistsError:
        pass  # another process was first; its key is used
    finally:
        Path(draft).unlink()
