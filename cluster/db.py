"""The database: one async SQLAlchemy engine over SQLite (WAL) or PostgreSQL.

One request or one job step is one transaction, opened with `transaction()`. Writers begin immediate on SQLite: a
deferred transaction that turns into a writer waits up to a second behind other writers, or fails.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CursorResult,
    DateTime,
    Delete,
    Dialect,
    Integer,
    MetaData,
    TypeDecorator,
    event,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from cluster.settings import get_settings

BUSY_TIMEOUT_SECONDS = 30

Result = TypeVar("Result")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time, also on SQLite, which stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("times are stored in UTC: give them a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime,
        dict[str, Any]: JSON().with_variant(JSONB, "postgresql"),
        list[str]: JSON().with_variant(JSONB, "postgresql"),
    }


class Database:
    """An engine and its two sorts of transaction."""

    def __init__(self, url: str, pool_size: int = 5) -> None:
        self.is_sqlite = url.startswith("sqlite")
        self.engine = _sqlite_engine(url) if self.is_sqlite else _postgres_engine(url, pool_size)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession]:
        """A read-write transaction: committed at the end of the block, rolled back if it raises."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session:
            async with session.begin():
                await _connect(session)
                yield session
                for prepare in session.info.pop("before_commit", []):
                    await prepare()
            for action in session.info.pop("after_commit", []):
                action()

    @asynccontextmanager
    async def read_transaction(self) -> AsyncGenerator[AsyncSession]:
        """A transaction that only reads: it never waits for a writer, and all that it reads was so at one time."""
        options = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        reader = self.engine.execution_options(forgearr_reading=True, **options)
        async with AsyncSession(reader, expire_on_commit=False) as session:
            await _connect(session)
            yield session

    async def close(self) -> None:
        await self.engine.dispose()


def before_commit(session: AsyncSession, callback: Callable[[], Awaitable[None]]) -> None:
    """Do this last in the transaction, when it holds all its other locks."""
    session.info.setdefault("before_commit", []).append(callback)


def after_commit(session: AsyncSession, callback: Callable[[], None]) -> None:
    """Tell the world only of what is really so: `action` runs when the transaction has committed, else never."""
    session.info.setdefault("after_commit", []).append(callback)


async def delete_rows(session: AsyncSession, statement: Delete) -> int:
    """Run a DELETE; returns how many rows it took."""
    result = await session.execute(statement)
    return cast(CursorResult[Any], result).rowcount


async def advisory_lock(session: AsyncSession, name: str) -> None:
    """Wait until no other transaction that has passed this name is open. On SQLite every writer is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))


def is_transient(error: SQLAlchemyError) -> bool:
    """Whether the same statement may succeed later: the database is away, busy, or has broken a deadlock."""
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return True
    sqlstate = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
    if isinstance(error, InternalError) and not sqlstate:
        return True  # the driver has lost its way, as it may where a connection breaks off
    return sqlstate[:2] in {"08", "40", "53", "55", "57"}


@cache
def get_database() -> Database:
    """This process's database."""
    settings = get_settings()
    return Database(settings.database_url, settings.database.pool_size)


async def with_own_database(work: Callable[[Database], Awaitable[Result]]) -> Result:
    """Do this with a database of its own: the one of the process belongs to another event loop."""
    database = Database(get_settings().database_url, pool_size=1)
    try:
        return await work(database)
    finally:
        await database.close()


def now() -> datetime:
    return datetime.now(UTC)


async def _connect(session: AsyncSession) -> None:
    """The line of defence: a server that cannot be reached is one error, whatever the driver calls it."""
    try:
        await session.connection()
    except SQLAlchemyError:
        raise
    except Exception as error:
        raise OperationalError("connect", None, error) from error


def _postgres_engine(url: str, pool_size: int) -> AsyncEngine:
    return create_async_engine(url, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True)


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None})

    @event.listens_for(engine.sync_engine, "connect")
    def set_pragmas(connection: Any, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        reading = connection.get_execution_options().get("forgearr_reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


# A JSON document or nothing: None is stored as SQL's NULL, not as JSON's null.
Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite counts up only in a column of type INTEGER.
Sequence = BigInteger().with_variant(Integer, "sqlite")
