"""Accounts and credentials, on both databases."""

import asyncio
import re
import stat
from datetime import timedelta
from pathlib import Path

import jwt
import pytest
from sqlalchemy import func, select, update

from cluster import identity
from cluster.db import Database, now
from cluster.errors import AccountDisabled, Unauthenticated, UnprocessableRequest
from cluster.identity.users import PLATFORM_NAMES
from cluster.secrets import signing_key, token_hash

PASSWORD = "correct horse battery"
ROOT = Path(__file__).parents[3]


async def add_user(database: Database, name: str = "ada", role: identity.Role = "user") -> identity.User:
    password_hash = await identity.hash_password(PASSWORD)
    async with database.transaction() as session:
        return await identity.add_user(
            session, email=f"{name}@example.com", username=name, password_hash=password_hash, role=role
        )


async def rotate(database: Database, token: str) -> str | None:
    async with database.transaction() as session:
        rotated = await identity.rotate_refresh_token(session, token)
    return rotated and rotated[1]


async def log_in(database: Database, user: identity.User) -> str:
    async with database.transaction() as session:
        return await identity.start_login(session, user)


@pytest.mark.both_databases
async def test_an_account_is_found_by_its_email_without_regard_to_case(database: Database) -> None:
    user = await add_user(database)
    async with database.read_transaction() as session:
        stored = await identity.find_user(session, " Ada@EXAMPLE.com ")
    assert stored is not None
    assert (stored.id, stored.email, stored.role, stored.is_active) == (user.id, "ada@example.com", "user", True)


@pytest.mark.parametrize("spelling", ["ada@exämple.org", "ADA@EXÄMPLE.org", "ada@xn--exmple-cua.org"])
async def test_an_international_domain_is_the_same_at_registration_and_login(database: Database, spelling: str) -> None:
    async with database.transaction() as session:
        user = await identity.add_user(session, email="ada@xn--exmple-cua.org", username="ada", password_hash="x")
    assert user.email == "ada@exämple.org"
    async with database.read_transaction() as session:
        stored = await identity.find_user(session, spelling)
        assert stored is not None
        assert stored.id == user.id
        assert await identity.find_user(session, "no address") is None


@pytest.mark.both_databases
@pytest.mark.parametrize(
    ("email", "username"), [("ADA@example.com", "other"), ("other@example.com", "ada"), ("other@example.com", "ADA")]
)
async def test_email_and_username_are_unique(database: Database, email: str, username: str) -> None:
    await add_user(database)
    with pytest.raises(identity.AccountExists):
        async with database.transaction() as session:
            await identity.add_user(session, email=email, username=username, password_hash="x")
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(identity.User)) == 1


@pytest.mark.parametrize(("email", "username"), [("ada", "ada"), ("a@b.example", "a/b"), ("a@b.example", "ada\n")])
async def test_malformed_accounts_are_refused(database: Database, email: str, username: str) -> None:
    with pytest.raises(UnprocessableRequest):
        async with database.transaction() as session:
            await identity.add_user(session, email=email, username=username, password_hash="x")


async def test_no_account_has_a_name_in_which_the_platform_acts(database: Database) -> None:
    for package in ("cluster", "jobs", "pipelines", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            for name in re.findall(r'\bsystem\("(\w+)"\)', file.read_text()):
                assert name in PLATFORM_NAMES, f"{file} acts as {name}"
    roles: tuple[identity.Role, ...] = ("user", "admin")
    for username in (*PLATFORM_NAMES, "System"):
        for role in roles:
            with pytest.raises(identity.ReservedUsername, match=username):
                async with database.transaction() as session:
                    await identity.add_user(
                        session, email="a@example.com", username=username, password_hash="x", role=role
                    )


async def test_only_an_administrator_may_be_named_like_one(database: Database) -> None:
    for username in ("admin", "Administrator", "ROOT"):
        with pytest.raises(identity.ReservedUsername):
            await add_user(database, username)
    assert (await add_user(database, "admin", "admin")).username == "admin"


async def test_only_an_active_admin_counts(database: Database) -> None:
    async def has_admin() -> bool:
        async with database.read_transaction() as session:
            return await identity.has_admin(session)

    await add_user(database)
    assert not await has_admin()
    admin = await add_user(database, "root", "admin")
    assert await has_admin()
    async with database.transaction() as session:
        await identity.set_active(session, await identity.get_user(session, admin.email), False)
    assert not await has_admin()


async def test_a_password_is_stored_as_an_argon2_hash(database: Database) -> None:
    user = await add_user(database)
    assert user.password_hash.startswith("$argon2id$")
    assert await identity.verify_password(user, PASSWORD)
    assert not await identity.verify_password(user, PASSWORD.upper())
    assert not await identity.verify_password(None, PASSWORD)


async def test_hashing_does_not_block_the_event_loop(database: Database) -> None:
    hashing = asyncio.ensure_future(identity.hash_password(PASSWORD))
    turns = 0
    while not hashing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10


@pytest.mark.parametrize(
    "password",
    [
        *(
            "12345678",
            "2026-11-29",
            "aaaaaaaaaaaa",
            "abababab",
            "password",
            "Password1!",
            "passwordpassword",
            "1q2w3e4r",
        ),
        *("ada-12345", "Ada2026!", "lovelace1815"),
    ],
)
async def test_the_first_guesses_are_no_passwords(password: str) -> None:
    with pytest.raises(identity.WeakPassword):
        await identity.hash_password(password, "ada", "lovelace@example.com")


@pytest.mark.parametrize("password", ["secret-garden", "correct horse", "adalovelace", "Ünïcödé-wörd"])
async def test_other_passwords_need_no_special_characters(password: str) -> None:
    assert await identity.hash_password(password, "ada", "lovelace@example.com")


@pytest.mark.parametrize("password", ["1234567", "x" * 257])
async def test_a_password_of_a_bad_length_is_refused(password: str) -> None:
    with pytest.raises(UnprocessableRequest):
        await identity.hash_password(password)


async def test_an_access_token_identifies_its_user(database: Database) -> None:
    user = await add_user(database, role="admin")
    token = identity.create_access_token(user)
    claims = jwt.decode(token, signing_key(), algorithms=["HS256"])
    assert (claims["sub"], claims["role"], claims["type"]) == (user.id, "admin", "access")
    assert claims["exp"] - claims["iat"] == 3600
    async with database.read_transaction() as session:
        assert (await identity.user_from_access_token(session, token)).id == user.id


async def test_a_forged_incomplete_or_expired_access_token_is_refused(database: Database) -> None:
    user = await add_user(database)
    good = jwt.decode(identity.create_access_token(user), signing_key(), algorithms=["HS256"])
    bad = [
        "nonsense",
        jwt.encode(good, "another key, also of 32 characters", algorithm="HS256"),
        jwt.encode(good, "", algorithm="none"),
        jwt.encode(good | {"exp": now() - timedelta(seconds=1)}, signing_key(), algorithm="HS256"),
        jwt.encode(good | {"type": "refresh"}, signing_key(), algorithm="HS256"),
        jwt.encode(good | {"sub": "nobody"}, signing_key(), algorithm="HS256"),
        jwt.encode({name: good[name] for name in good if name != "exp"}, signing_key(), algorithm="HS256"),
        jwt.encode({name: good[name] for name in good if name != "ver"}, signing_key(), algorithm="HS256"),
        jwt.encode(good | {"ver": 1}, signing_key(), algorithm="HS256"),
    ]
    async with database.read_transaction() as session:
        for token in bad:
            with pytest.raises(Unauthenticated):
                await identity.user_from_access_token(session, token)


async def test_disabling_an_account_ends_every_credential_at_once(database: Database) -> None:
    user = await add_user(database)
    access, refresh = identity.create_access_token(user), await log_in(database, user)
    async with database.transaction() as session:
        _, key = await identity.create_key(session, user.id, "laptop")
        await identity.set_active(session, await identity.get_user(session, user.email), False)
    assert await rotate(database, refresh) is None
    async with database.read_transaction() as session:
        with pytest.raises(AccountDisabled):
            await identity.user_from_access_token(session, access)
        with pytest.raises(AccountDisabled):
            await identity.user_from_key(session, key)


async def test_a_new_password_ends_the_credentials_of_the_old_one(database: Database) -> None:
    user, other = await add_user(database), await add_user(database, "bob")
    access, refresh = identity.create_access_token(user), await log_in(database, user)
    others = identity.create_access_token(other)
    password_hash = await identity.hash_password("another password")
    async with database.transaction() as session:
        _, key = await identity.create_key(session, user.id, "laptop")
        _, others_key = await identity.create_key(session, other.id, "laptop")
    async with database.transaction() as session:
        await identity.set_password(session, await identity.get_user(session, user.email), password_hash)
    async with database.read_transaction() as session:
        user = await identity.get_user(session, user.email)
        with pytest.raises(Unauthenticated):
            await identity.user_from_access_token(session, access)
        with pytest.raises(Unauthenticated):
            await identity.user_from_key(session, key)
        assert (await identity.user_from_access_token(session, others)).id == other.id
        assert (await identity.user_from_key(session, others_key))[0].id == other.id
    assert await identity.verify_password(user, "another password")
    assert await rotate(database, refresh) is None


async def test_an_account_that_is_enabled_again_has_none_of_its_old_keys(database: Database) -> None:
    user = await add_user(database)
    async with database.transaction() as session:
        _, key = await identity.create_key(session, user.id, "laptop")
        await identity.set_active(session, await identity.get_user(session, user.email), True)  # it is active
    async with database.read_transaction() as session:
        await identity.user_from_key(session, key)
    for active in (False, True):
        async with database.transaction() as session:
            await identity.set_active(session, await identity.get_user(session, user.email), active)
    async with database.read_transaction() as session:
        with pytest.raises(Unauthenticated):
            await identity.user_from_key(session, key)


@pytest.mark.both_databases
async def test_concurrent_changes_of_an_account_end_all_that_came_before_each(database: Database) -> None:
    user = await add_user(database)

    async def end() -> None:
        async with database.transaction() as session:
            await identity.end_all_credentials(session, await identity.get_user(session, user.email))

    await asyncio.gather(*(end() for _ in range(5)))
    async with database.read_transaction() as session:
        assert (await identity.get_user(session, user.email)).token_version == 5


async def test_a_reused_refresh_token_revokes_its_login(database: Database) -> None:
    user = await add_user(database)
    first, other_login = await log_in(database, user), await log_in(database, user)
    second = await rotate(database, first)
    assert second is not None
    assert second != first
    assert await rotate(database, first) is None
    assert await rotate(database, second) is None
    assert await rotate(database, other_login) is not None


@pytest.mark.both_databases
async def test_concurrent_uses_of_a_refresh_token_revoke_its_login(database: Database) -> None:
    user = await add_user(database)
    first = await log_in(database, user)
    results = await asyncio.gather(*(rotate(database, first) for _ in range(5)))
    tokens = [token for token in results if token]
    assert len(tokens) == 1
    assert await rotate(database, tokens[0]) is None


async def test_an_expired_refresh_token_is_refused_and_deleted_at_the_next_login(database: Database) -> None:
    user = await add_user(database)
    token = await log_in(database, user)
    async with database.transaction() as session:
        await session.execute(update(identity.RefreshToken).values(expires_at=now() - timedelta(seconds=1)))
    assert await rotate(database, token) is None
    await log_in(database, user)
    async with database.read_transaction() as session:
        assert await session.get(identity.RefreshToken, token_hash(token)) is None
        stored = await identity.get_user(session, user.email)
    assert stored.last_login_at is not None


async def test_ending_a_login_revokes_all_its_refresh_tokens(database: Database) -> None:
    user = await add_user(database)
    first = await log_in(database, user)
    second = await rotate(database, first)
    assert second is not None
    async with database.transaction() as session:
        await identity.end_login(session, first)
        await identity.end_login(session, "refresh_unknown")
    assert await rotate(database, second) is None


async def test_an_api_key_is_stored_as_a_hash_with_a_prefix(database: Database) -> None:
    user = await add_user(database)
    async with database.transaction() as session:
        key, token = await identity.create_key(session, user.id, "laptop")
    assert token.startswith(key.prefix)
    assert len(key.prefix) == len("fgr_") + 8
    assert token not in str(vars(key))
    async with database.read_transaction() as session:
        owner, stored = await identity.user_from_key(session, token)
        assert (owner.id, stored.name) == (user.id, "laptop")
        with pytest.raises(Unauthenticated):
            await identity.user_from_key(session, token + "x")


async def test_an_api_key_expires(database: Database) -> None:
    user = await add_user(database)
    async with database.transaction() as session:
        _, token = await identity.create_key(session, user.id, "laptop", now() + timedelta(days=1))
    async with database.read_transaction() as session:
        await identity.user_from_key(session, token)
    async with database.transaction() as session:
        await session.execute(update(identity.ApiKey).values(expires_at=now() - timedelta(seconds=1)))
    async with database.read_transaction() as session:
        with pytest.raises(Unauthenticated, match="expired"):
            await identity.user_from_key(session, token)


async def test_a_key_is_revoked_by_its_owner_only(database: Database) -> None:
    ada, bob = await add_user(database), await add_user(database, "bob")
    async with database.transaction() as session:
        key, token = await identity.create_key(session, ada.id, "laptop")
    with pytest.raises(identity.KeyNotFound):
        async with database.transaction() as session:
            await identity.revoke_key(session, key.id, bob.id)
    async with database.transaction() as session:
        await identity.revoke_key(session, key.id, ada.id)
    async with database.read_transaction() as session:
        assert await identity.list_keys(session) == []
        with pytest.raises(Unauthenticated):
            await identity.user_from_key(session, token)


@pytest.mark.both_databases
async def test_the_use_of_a_key_is_recorded_once_a_minute(database: Database) -> None:
    user = await add_user(database)
    async with database.transaction() as session:
        key, token = await identity.create_key(session, user.id, "laptop")
    assert identity.should_record_use(key)

    async def use() -> identity.ApiKey:
        async with database.transaction() as session:
            await identity.record_use(session, key)
        async with database.read_transaction() as session:
            return (await identity.user_from_key(session, token))[1]

    first = await use()
    assert not identity.should_record_use(first)
    assert (await use()).last_used_at == first.last_used_at
    async with database.transaction() as session:
        await session.execute(update(identity.ApiKey).values(last_used_at=now() - timedelta(minutes=2)))
    assert (await use()).last_used_at >= first.last_used_at  # type: ignore[operator]


def test_only_the_owner_can_read_the_signing_key(home: Path) -> None:
    assert len(signing_key()) >= 32
    assert stat.S_IMODE((home / "keys" / "signing").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.both_databases
async def test_tokens_of_people_who_never_come_back_are_deleted_when_they_have_expired(database: Database) -> None:
    await log_in(database, await add_user(database))
    async with database.transaction() as session:
        await session.execute(update(identity.RefreshToken).values(expires_at=now() - timedelta(seconds=1)))
    fresh = await log_in(database, await add_user(database, "bob"))
    async with database.transaction() as session:
        assert await identity.delete_expired_logins(session) == 1
        assert list(await session.scalars(select(identity.RefreshToken.hash))) == [token_hash(fresh)]
