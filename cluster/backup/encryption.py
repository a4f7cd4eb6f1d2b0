"""Encrypt a stream with a passphrase, in the age format.

Only small contents can be encrypted with a passphrase without holding them in memory. So the stream is encrypted with a
random key of its own, and the key with the passphrase. age calls such a key an identity file.
"""

import io
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyrage
from pyrage import passphrase as pyrage_passphrase  # pyright: ignore[reportMissingModuleSource]
from pyrage import x25519  # pyright: ignore[reportMissingModuleSource]

from cluster.backup.errors import BackupDamaged, BackupFailed, WrongPassphrase


class Key:
    """The key of one backup."""

    def __init__(self, identity: x25519.Identity) -> None:
        self._identity = identity

    @classmethod
    def new(cls) -> "Key":
        return cls(x25519.Identity.generate())

    @classmethod
    def open(cls, locked: bytes, passphrase: str) -> "Key":
        try:
            return cls(x25519.Identity.from_str(pyrage_passphrase.decrypt(locked, passphrase).decode()))
        except pyrage.DecryptError:
            raise WrongPassphrase from None

    def lock(self, passphrase: str) -> bytes:
        """Encrypt the key with a passphrase. It takes a second on purpose, so that guesses do too."""
        return pyrage_passphrase.encrypt(str(self._identity).encode(), passphrase)

    @contextmanager
    def encrypting(self, target: BinaryIO) -> Generator[BinaryIO]:
        """A file to write to. What is written reaches `target` encrypted."""
        reader, writer = _pipe()

        def encrypt() -> None:
            with reader:
                pyrage.encrypt_io(reader, _stream(target), [self._identity.to_public()])

        with _in_thread(encrypt), writer:
            yield writer

    @contextmanager
    def decrypting(self, source: BinaryIO) -> Generator[BinaryIO]:
        """A file to read from, to its end: what `source` has, decrypted."""
        reader, writer = _pipe()

        def decrypt() -> None:
            with writer:
                pyrage.decrypt_io(_stream(source), writer, [self._identity])

        with _in_thread(decrypt), reader:
            yield reader


def _stream(file: BinaryIO) -> io.BufferedIOBase:
    """The type that pyrage's stubs ask for. It calls `read` and `write` only."""
    return cast(io.BufferedIOBase, file)


def _pipe() -> "tuple[io.BufferedReader, io.BufferedWriter]":
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb")


@contextmanager
def _in_thread(work: Callable[[], None]) -> Generator[None]:
    """Run `work` beside the block, which closes its end of the pipe. Of two errors, the first one is raised."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="age", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        thread.join()
        if errors and (isinstance(error, BrokenPipeError) or _is_damage(errors[0])):
            raise _translate(errors[0]) from errors[0]
        raise
    finally:
        thread.join()
    if errors:
        raise _translate(errors[0]) from errors[0]


def _translate(error: Exception) -> Exception:
    if _is_damage(error):
        return BackupDamaged(f"The content of the backup cannot be decrypted: {error}.")
    return (
        BackupFailed(f"The backup could not be written: {error}.") if isinstance(error, pyrage.EncryptError) else error
    )


def _is_damage(error: Exception) -> bool:
    """pyrage has no class of its own for it."""
    return isinstance(error, pyrage.DecryptError) or "decryption error" in str(error)
