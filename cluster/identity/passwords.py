"""Hash and verify passwords with Argon2, in threads, so that the event loop is not blocked."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from pwdlib import PasswordHash

from cluster.errors import UnprocessableRequest
from cluster.identity.users import MAX_PASSWORD_LENGTH, MIN_PASSWORD_LENGTH, User

# One hash takes 64 MB and a core. With two at a time, a burst of logins does not overload the machine.
_hash_executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="password")


async def hash_password(password: str) -> str:
    if not MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH:
        raise UnprocessableRequest(f"A password must have {MIN_PASSWORD_LENGTH} to {MAX_PASSWORD_LENGTH} characters.")
    return await asyncio.get_running_loop().run_in_executor(_hash_executor, _hasher().hash, password)


async def verify_password(user: User | None, password: str) -> bool:
    """Whether this is the user's password. It takes as long without a user, so that timing reveals no account."""
    loop = asyncio.get_running_loop()
    if user is None:
        await loop.run_in_executor(_hash_executor, _hasher().hash, password)
        return False
    return await loop.run_in_executor(_hash_executor, _hasher().verify, password, user.password_hash)


@cache
def _hasher() -> PasswordHash:
    return PasswordHash.recommended()
