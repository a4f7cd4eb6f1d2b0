"""Database access: one async SQLAlchemy engine over SQLite (WAL) or PostgreSQL.

Each request and each job step is one transaction, opened with `transaction()`. On SQLite it begins with BEGIN
IMMEDIATE: a deferred transaction that becomes a writer later waits up to a second behind other writers, or fails.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
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

from cluster.errors import Unavailable
from cluster.settings import get_settings

BUSY_TIMEOUT_SECONDS = 30
MAX_IDLE_TRANSACTION_SECONDS = 60
"""When PostgreSQL ends a transaction that does nothing: a frozen process must not keep its locks for ever."""
MAX_BLOCKING_CALLS = 32
"""How many blocking calls (`asyncio.to_thread`) the coroutines of all threads may make at the same time."""

Result = TypeVar("Result")


class DatabaseUnavailable(Unavailable):
    """The database does not respond; try again in a moment."""

    code = "DATABASE_UNAVAILABLE"
    retry_after = 5


class UtcDateTime(TypeDecorator[datetime]):
    """The column type of an aware UTC time. It also works on SQLite, which stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time needs a time zone to be stored")
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
    """An engine, with read-write and read-only transactions."""

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
        """A read-only transaction. It never waits for a writer, and all its reads see the same snapshot."""
        options = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        reader = self.engine.execution_options(forgearr_read_only=True, **options)
        async with AsyncSession(reader, expire_on_commit=False) as session:
            await _connect(session)
            yield session

    async def close(self) -> None:
        await self.engine.dispose()


def before_commit(session: AsyncSession, callback: Callable[[], Awaitable[None]]) -> None:
    """Call `callback` right before the commit, when the transaction holds all its other locks."""
    session.info.setdefault("before_commit", []).append(callback)


def after_commit(session: AsyncSession, callback: Callable[[], None]) -> None:
    """Call `callback` once the transaction has committed. After a rollback it is not called."""
    session.info.setdefault("after_commit", []).append(callback)


async def delete_rows(session: AsyncSession, statement: Delete) -> int:
    """Run a DELETE and return the number of deleted rows."""
    result = await session.execute(statement)
    return cast(CursorResult[Any], result).rowcount


async def advisory_lock(session: AsyncSession, name: str) -> None:
    """Hold a named lock until the transaction ends. SQLite needs none: it has one write transaction at a time."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))


def is_transient(error: SQLAlchemyError) -> bool:
    """Whether the statement may succeed later: the database is unreachable or busy, or it ended a deadlock."""
    if getattr(getattr(error, "orig", None), "sqlite_errorname", None) == "SQLITE_ERROR":
        return False  # a missing table, for example
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return True
    sqlstate = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
    if isinstance(error, InternalError) and not sqlstate:
        return True  # the driver's own error, which it may raise when a connection breaks
    return sqlstate[:2] in {"08", "40", "53", "55", "57"} or sqlstate == "25P03"  # its transaction did nothing


@cache
def get_database() -> Database:
    """Return the database of this process."""
    settings = get_settings()
    return Database(settings.database_url, settings.database.pool_size)


def run_with_database(work: Callable[[Database], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work` for a thread without an event loop, such as that of a job, and return its result.

    Connections belong to an event loop. So all threads of a process share one, with one pool.
    """
    with _loop_lock:  # @cache does not prevent that two threads make a loop each
        loop = _threads_loop()
    return asyncio.run_coroutine_threadsafe(_run_with_tasks(work), loop).result()


def close_threads_database() -> None:
    """Close the connections that threads have shared. The next call opens new ones."""
    if _threads_database.cache_info().currsize:
        asyncio.run_coroutine_threadsafe(_threads_database().close(), _threads_loop()).result()
        _threads_database.cache_clear()


def now() -> datetime:
    return datetime.now(UTC)


_loop_lock = threading.Lock()
_tasks: ContextVar[set[asyncio.Task[Any]] | None] = ContextVar("tasks", default=None)


async def _run_with_tasks(work: Callable[[Database], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work`, and cancel the tasks that it leaves behind, as `asyncio.run` does."""
    tasks: set[asyncio.Task[Any]] = set()
    _tasks.set(tasks)
    try:
        return await work(_threads_database())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task[Any](coroutine, loop=loop, **options)
    if (tasks := _tasks.get()) is not None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return task


@cache
def _threads_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(_create_task)
    loop.set_default_executor(ThreadPoolExecutor(MAX_BLOCKING_CALLS, thread_name_prefix="blocking"))
    threading.Thread(target=loop.run_forever, name="database", daemon=True).start()
    return loop


@cache
def _threads_database() -> Database:
    settings = get_settings()
    return Database(settings.database_url, settings.database.pool_size)


async def _connect(session: AsyncSession) -> None:
    """Open the connection. If the server is unreachable, raise OperationalError, whatever the driver raises."""
    try:
        await session.connection()
    except SQLAlchemyError:
        raise
    except Exception as error:
        raise OperationalError("connect", None, error) from error


def _postgres_engine(url: str, pool_size: int) -> AsyncEngine:
    engine = create_async_engine(url, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True)

    @event.listens_for(engine.sync_engine, "connect")
    def set_timeout(connection: Any, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.autocommit = True  # in a transaction, a rollback would undo it
        cursor = connection.cursor()
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{MAX_IDLE_TRANSACTION_SECONDS}s'")
        cursor.close()
        connection.autocommit = False

    return engine


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
        read_only = connection.get_execution_options().get("forgearr_read_only")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


# An optional JSON document: None is stored as SQL's NULL, not as JSON's null.
Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite increments only a column of type INTEGER by itself.
Sequence = BigInteger().with_variant(Integer, "sqlite")
