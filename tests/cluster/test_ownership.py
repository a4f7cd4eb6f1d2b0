"""The ownership rule, for every table with owners."""

import ast
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Table, TypeDecorator, create_engine, insert, select
from sqlalchemy.orm import Session

from cluster import identity, ownership
from cluster.db import Base, Database
from cluster.errors import AccountDisabled, Forbidden, NotFound
from cluster.ownership import LOCAL, Principal, can_access, require, visible
from jobs import queue
from jobs.queue import JobRequest
from jobs.tables import Job
from serve.app import create_app

ROOT = Path(__file__).parents[2]
ADA, BOB, ROOT_USER = "a" * 36, "b" * 36, "c" * 36
OWNERS = (ADA, BOB, None)
PRINCIPALS = [
    (Principal(id=ADA, name="ada"), {ADA}),
    (Principal(id=BOB, name="bob"), {BOB}),
    (Principal(id=ROOT_USER, name="root", is_admin=True), {ADA, BOB, None}),
    (Principal(name="nobody"), set[str | None]()),
    (LOCAL, {ADA, BOB, None}),
]
VALUES: dict[type, Any] = {str: "x", int: 1, float: 1.0, bool: False, datetime: datetime(2026, 1, 1, tzinfo=UTC)}


def owned_tables() -> dict[str, Any]:
    create_app()  # imports every table
    tables = {mapper.class_.__name__: mapper.class_ for mapper in Base.registry.mappers}
    return {name: table for name, table in tables.items() if hasattr(table, "owner_id")}


OWNED = owned_tables()


def test_every_table_with_owners_is_tested() -> None:
    assert set(OWNED) >= {"Job", "Schedule", "File", "Upload", "Dataset", "Prompt", "Feedback", "Batch"}


@pytest.mark.parametrize("name", sorted(OWNED))
def test_users_see_their_own_rows_and_administrators_all_rows(name: str) -> None:
    row_type = OWNED[name]
    table: Table = row_type.__table__
    engine = create_engine("sqlite://")
    table.create(engine)
    with Session(engine) as session:
        rows = [{**_required_values(table, number), "owner_id": owner} for number, owner in enumerate(OWNERS)]
        session.execute(insert(table), rows)
        seen = {
            principal.name: set(session.scalars(visible(select(row_type.owner_id), row_type, principal)))
            for principal, _ in PRINCIPALS
        }
        stored = list(session.scalars(select(row_type)))
    engine.dispose()
    assert seen == {principal.name: visible_owners for principal, visible_owners in PRINCIPALS}
    for principal, visible_owners in PRINCIPALS:
        assert {row.owner_id for row in stored if can_access(row, principal)} == visible_owners


@pytest.mark.parametrize(("principal", "visible_owners"), PRINCIPALS)
def test_a_row_of_another_owner_does_not_exist(principal: Principal, visible_owners: set[str | None]) -> None:
    missing = NotFound("There is no such job.")
    for row in (*(Job(owner_id=owner) for owner in OWNERS), None):
        if row is not None and row.owner_id in visible_owners:
            assert require(row, principal, missing) is row
        else:
            with pytest.raises(NotFound, match="no such job"):
                require(row, principal, missing)


def test_the_rule_is_implemented_once() -> None:
    """No other module compares owners with principals that may be administrators."""
    repeated: list[str] = []
    for package in ("cluster", "jobs", "pipelines", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            if file == Path(ownership.__file__):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.BoolOp | ast.IfExp | ast.If):
                    test = node if isinstance(node, ast.BoolOp | ast.IfExp) else ast.Module([node], [])
                    names = {part.attr for part in ast.walk(test) if isinstance(part, ast.Attribute)}
                    if {"is_admin", "owner_id"} <= names:
                        repeated.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert repeated == []


async def test_a_stored_row_has_the_current_rights_of_its_owner(database: Database) -> None:
    async with database.transaction() as session:
        user = await identity.add_user(
            session, email="ada@example.com", username="ada", password_hash="-", role="admin"
        )
    for role in ("admin", "user"):
        async with database.transaction() as session:
            user = await session.get_one(identity.User, user.id)
            user.role = role
        async with database.read_transaction() as session:
            principal = await identity.find_principal(session, user.id, "schedule:nightly")
        assert principal == Principal(id=user.id, name="schedule:nightly", is_admin=role == "admin")
    async with database.transaction() as session:
        await identity.set_active(session, await session.get_one(identity.User, user.id), False)
    async with database.read_transaction() as session:
        with pytest.raises(AccountDisabled, match="The account of ada, in whose name this runs, is disabled"):
            await identity.find_principal(session, user.id)
        with pytest.raises(Forbidden, match=f"'{BOB}', in whose name this runs, does not exist"):
            await identity.find_principal(session, BOB)
        assert await identity.find_principal(session, None) == LOCAL


async def test_child_jobs_have_the_current_rights_of_their_owner(database: Database) -> None:
    async with database.transaction() as session:
        user = await identity.add_user(
            session, email="ada@example.com", username="ada", password_hash="-", role="admin"
        )
        parent = await queue.enqueue(session, JobRequest(kind="probe"), identity.principal(user))
        child = await queue.enqueue_child(session, parent, "as administrator", "sweep", {})
        assert (child.owner_id, child.created_by) == (user.id, "ada")
        user.role = "user"
        with pytest.raises(Forbidden, match="Only an administrator may run 'sweep'"):
            await queue.enqueue_child(session, parent, "as user", "sweep", {})
        await queue.enqueue_child(session, parent, "allowed", "probe", {})
        user.is_active = False
        with pytest.raises(AccountDisabled):
            await queue.enqueue_child(session, parent, "disabled", "probe", {})


def _required_values(table: Table, number: int) -> dict[str, Any]:
    """Return a value for each required column."""
    return {column.name: _value_of(column, number) for column in table.columns if not column.nullable}


def _value_of(column: Column[Any], number: int) -> Any:
    kind = (column.type.impl_instance if isinstance(column.type, TypeDecorator) else column.type).python_type
    if column.primary_key or column.unique:
        return number + 1 if kind is int else f"x{number}"
    return VALUES.get(kind, {} if kind is dict else [])
