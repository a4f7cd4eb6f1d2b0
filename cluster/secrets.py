"""The keys of this installation, the tokens that it issues, and the encryption of stored secrets.

Keys are files under FORGEARR_HOME/keys, readable by their owner only and created on first use. Tokens are random; only
their hash is stored. A secret that Forgearr must send to others, such as a service's password, is sealed (encrypted)
before it is stored in the database. cluster/sealing changes the key with which that is done.
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
from cluster.errors import ForgearrError, SettingsError, Unavailable
from cluster.settings import MIN_KEY_LENGTH, NODE_SECRETS_VARIABLE, get_settings, home

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

MLFLOW_USER = "forgearr"

OLD_SEALING_KEY = "sealing.old"
KEYS = {
    "signing": "a new key is made, and access tokens from before are not valid",
    "sealing": "a new key is made, and `forgearr keys check` lists the secrets that must be entered again",
    OLD_SEALING_KEY: "`forgearr keys check` lists the secrets that must be entered again",
    "mlflow": "a new key is made, and MLflow's pages ask for the new password",
    "ray": "a new key is made, and Ray's dashboard asks for the new token",
}
"""The names of the key files, and what happens after one is deleted."""


class KeyDamaged(Unavailable):
    """A key file of this installation is damaged."""

    code = "KEY_DAMAGED"
    retryable = False


class SealBroken(ForgearrError):
    """A secret was sealed with another key; `forgearr keys check` lists all of them, and how to enter them again."""

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


def new_signing_key() -> None:
    """Replace the key that signs access tokens. Those from before are not valid any more."""
    if get_settings().auth.signing_key:
        raise SettingsError(
            "The signing key is a setting (auth.signing_key): change it there, on every node, while nothing runs."
        )
    path = _key_path("signing")
    durable.publish(_write_draft(path.name), path)


def new_sealing_key() -> None:
    """Replace the key that seals. The old one opens what it has sealed, until `forget_old_sealing_key`.

    At each moment the files open everything that is stored: the old key gets its second name before the new key takes
    the first one. If an earlier call was interrupted after that, its new key stays.
    """
    if get_settings().auth.sealing_key:
        if get_settings().auth.old_sealing_key is None:
            raise SettingsError(
                "The sealing key is a setting (auth.sealing_key). Give its value to auth.old_sealing_key, and a new "
                "random one to auth.sealing_key, on every node. Then run `forgearr keys rotate` again."
            )
        return
    current, old = _key_path("sealing"), home() / "keys" / OLD_SEALING_KEY
    if not old.exists():
        os.link(current, old)
        durable.sync(old.parent)
    elif _read_key(old) != _read_key(current):
        return
    durable.publish(_write_draft(current.name), current)


def forget_old_sealing_key() -> None:
    """Delete the old sealing key. That of the settings stays: whoever has set it removes it."""
    old = home() / "keys" / OLD_SEALING_KEY
    if old.exists():
        old.unlink()
        durable.sync(old.parent)


def has_old_sealing_key() -> bool:
    """Whether an old sealing key is accepted too: one of the settings, or of a change that has not finished."""
    return get_settings().auth.old_sealing_key is not None or (home() / "keys" / OLD_SEALING_KEY).exists()


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
    return _fernet(_sealing_key()).encrypt(secret.encode()).decode()


def unseal(sealed: str) -> str:
    from cryptography.fernet import InvalidToken, MultiFernet

    keys = _opening_keys()
    if not keys:
        raise SealBroken
    try:
        return MultiFernet([_fernet(key) for key in keys]).decrypt(sealed).decode()
    except InvalidToken:
        raise SealBroken from None


def _fernet(key: str) -> "Fernet":
    from cryptography.fernet import Fernet

    # A key may have any length and characters. Its hash has the 32 bytes that Fernet needs.
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()))


def _sealing_key() -> str:
    configured = get_settings().auth.sealing_key
    return configured.get_secret_value() if configured else _read_or_create_key("sealing")


def _opening_keys() -> list[str]:
    """The keys with which something may have been sealed. None is made: a new one would open nothing."""
    auth, keys = get_settings().auth, home() / "keys"
    found = [key.get_secret_value() for key in (auth.sealing_key, auth.old_sealing_key) if key]
    names = [OLD_SEALING_KEY] if auth.sealing_key else ["sealing", OLD_SEALING_KEY]
    if not auth.sealing_key and NODE_SECRETS_VARIABLE in os.environ:
        _key_path("sealing")  # a node without it says so
    return [*found, *(_read_key(keys / name) for name in names if (keys / name).exists())]


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
            f"at least {MIN_KEY_LENGTH}. Restore it from a backup. Without one, delete it: then {KEYS[path.name]}."
        )
    return key


def _create_key(path: Path) -> None:
    """Create a key file atomically. Two processes that create it at the same time use the same key."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = _write_draft(path.name)
    try:
        durable.sync(draft)
        os.link(draft, path)
        durable.sync(path.parent)
        durable.sync(path.parent.parent)
    except FileExistsError:
        pass  # another process was first; its key is used
    finally:
        draft.unlink()


def _write_draft(name: str) -> Path:
    """Write a new key into a file that does not have its name yet."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{name}.", dir=home() / "keys")  # only its owner can read it
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return Path(draft)
