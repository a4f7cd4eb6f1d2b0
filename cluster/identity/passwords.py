"""Hashing of passwords with Argon2, off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from pwdlib import PasswordHash

from cluster.errors import UnprocessableRequest
from cluster.identity.users import PASSWORD_MAX, PASSWORD_MIN, User

# One argon2 takes 64 MB and a core; two at a time keep a burst of logins from taking the machine.
_hashing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="password")


# Passwords


async def hash_password(password: str) -> str:
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise UnprocessableRequest(f"A password has {PASSWORD_MIN} to {PASSWORD_MAX} characters.")
    return await asyncio.get_running_loop().run_in_executor(_hashing, _hasher().hash, password)


async def is_password_of(user: User | None, password: str) -> bool:
    """Whether this is the user's password. Takes as long for nobody, so that it does not tell who has an account."""
    loop = asyncio.get_running_loop()
    if user is None:
        await loop.run_in_executor(_hashing, _hasher().hash, password)
        return False
    return await loop.run_in_executor(_hashing, _hasher().verify, password, user.password_hash)


@cache
def _hasher() -> PasswordHash:
    return PasswordHash.recommended()
