"""`python -m cluster.migrations "add teams"`: write a migration from the newest version to the tables in the code.

It compares with a new database in memory, so the state of an existing database does not matter. Read the result: it
does not detect an index on an expression, a renamed column, or data that has to be moved.
"""

import subprocess
import sys

from alembic import command
from alembic.script import Script, ScriptDirectory
from sqlalchemy import create_engine

from cluster.migrations import configuration, upgrade


def main(message: str) -> None:
    with create_engine("sqlite://").begin() as connection:
        upgrade(connection)
        config = configuration(connection)
        number = len(list(ScriptDirectory.from_config(config).walk_revisions())) + 1
        script = command.revision(config, message, autogenerate=True, rev_id=f"{number:04}")
    assert isinstance(script, Script)
    for action in (["check", "--fix-only", "--quiet"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *action, script.path], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('A message is required: make migration MESSAGE="add teams"')
    main(sys.argv[1])
