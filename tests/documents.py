"""The official documents of services, which lie in `shared/specs` beside the checkout; without them, tests skip."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

FOLDER = Path(__file__).parents[2] / "shared" / "specs"


def check_answer(document: str, path: str, content: object) -> None:
    """Fail unless this is what the document says that a GET of this path answers."""
    told = _document(document)
    (answer,) = {str(kinds["schema"]) for kinds in told["paths"][path]["get"]["responses"]["200"]["content"].values()}
    schema = told["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == str(schema)
    Draft7Validator({**schema, "components": told["components"]}).validate(content)


@cache
def _document(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}-v3.json"
    if not path.exists():
        pytest.skip(f"The official document of {name} is not at {path}.")
    return _nullable(json.loads(path.read_text()))


def _nullable(schema: Any) -> Any:
    """OpenAPI 3.0 says `nullable` where JSON Schema has a type of its own for null."""
    if isinstance(schema, list):
        return [_nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _nullable(part) for name, part in schema.items()}
    if plain.get("nullable") is True and isinstance(plain.get("type"), str):
        plain["type"] = [plain["type"], "null"]
    return plain
