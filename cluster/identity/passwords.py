"""Hash and verify passwords with Argon2, in threads, so that the event loop is not blocked.

The rule for new passwords is NIST's (SP 800-63B): a minimum length, no demands on the characters, and none of the
commonest.
"""

import asyncio
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from pwdlib import PasswordHash

from cluster.errors import UnprocessableRequest
from cluster.identity.users import MAX_PASSWORD_LENGTH, MIN_PASSWORD_LENGTH, User

MIN_DIFFERENT_CHARACTERS = 5
COMMON_WORDS = re.compile(
    "password|passwort|passwd|passwrd|pssword|psswrd|qwer|qwert|qwerty|qwertyuiop|qwertz|qwertzuiop|azerty|azertyuiop|"
    "asdf|asdfgh|asdfghjkl|zxcvbn|zxcvbnm|qazwsx|qazwsxedc|abc|abcd|abcdef|abcdefg|abcdefgh|iloveyou|loveyou|letmein|"
    "welcome|changeme|trustno|admin|administrator|root|user|test|guest|login|master|monkey|dragon|football|baseball|"
    "basketball|superman|batman|sunshine|princess|shadow|michael|jordan|charlie|starwars|whatever|computer|internet|"
    "hello|freedom|forgearr"
)
"""The letters of the commonest passwords of eight characters and more, without their digits and signs."""

# One hash takes 64 MB and a core. With two at a time, a burst of logins does not overload the machine.
_hash_executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="password")


class WeakPassword(UnprocessableRequest):
    """This password is among the first that are guessed."""

    code = "WEAK_PASSWORD"


async def hash_password(password: str, *names: str) -> str:
    """Hash a new password. It may be neither one of the commonest nor, with digits, one of these names of its owner."""
    if not MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH:
        raise UnprocessableRequest(f"A password must have {MIN_PASSWORD_LENGTH} to {MAX_PASSWORD_LENGTH} characters.")
    if _is_guessable(password, names):
        raise WeakPassword(
            "This password is among the first that are guessed: a sequence, a common word or the name of its owner, "
            "perhaps with digits. Take several words, or let a password manager choose."
        )
    return await asyncio.get_running_loop().run_in_executor(_hash_executor, _hasher().hash, password)


async def verify_password(user: User | None, password: str) -> bool:
    """Whether this is the user's password. It takes as long without a user, so that timing reveals no account."""
    loop = asyncio.get_running_loop()
    if user is None:
        await loop.run_in_executor(_hash_executor, _hasher().hash, password)
        return False
    return await loop.run_in_executor(_hash_executor, _hasher().verify, password, user.password_hash)


def _is_guessable(password: str, names: Iterable[str]) -> bool:
    """Whether few characters differ, or all letters are one word that is common or a name, once or repeated."""
    own_words = {_letters(part) for name in names for part in (name, name.partition("@")[0])}
    word = re.sub(r"^(.+?)\1+$", r"\1", _letters(password))
    is_known = not word or word in own_words or COMMON_WORDS.fullmatch(word) is not None
    return is_known or len(set(password)) < MIN_DIFFERENT_CHARACTERS


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalpha())


@cache
def _hasher() -> PasswordHash:
    return PasswordHash.recommended()
