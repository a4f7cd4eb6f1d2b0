"""The official OpenAPI documents of services, in `shared/specs` beside the checkout; without them, tests skip."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

FOLDER = Path(__file__).parents[4] / "shared" / "specs"


def document_path(document: str) -> Path:
    path = FOLDER / f"{document}-v3.json"
    if not path.exists():
        pytest.skip(f"The official document of {document} is not at {path}.")
    return path


def corrected(document: str) -> dict[str, Any]:
    """The document with one correction: a command has additional fields, such as seriesId."""
    content = json.loads(document_path(document).read_text())
    for name in ("CommandResource", "Command"):
        content["components"]["schemas"][name]["additionalProperties"] = True
    return content


def check_request(document: str, method: str, path: str, query: Mapping[str, str], body: object = None) -> None:
    """Fail unless the document has this operation, with these parameters and this body."""
    operation = _operation(document, method, path)
    schemas = {
        parameter["name"]: parameter["schema"]
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query"
    }
    for name, value in query.items():
        assert name in schemas, f"{method} {path} has no parameter {name}"
        _validate(document, schemas[name], _as_sent(schemas[name].get("type"), value))
    if "requestBody" not in operation:
        assert body is None, f"{method} {path} takes no body"
        return
    _validate(document, operation["requestBody"]["content"]["application/json"]["schema"], body)


def check_response(document: str, path: str, content: object, method: str = "GET") -> None:
    """Fail unless this is a response of this operation, as the document declares it."""
    kinds = _operation(document, method, path)["responses"]["200"].get("content")
    if kinds is None:
        return  # the document declares no content
    (_,) = {str(kind["schema"]) for kind in kinds.values()}
    _validate(document, kinds["application/json"]["schema"], content)


def _validate(document: str, schema: dict[str, Any], content: object) -> None:
    Draft7Validator({**schema, "components": _document(document)["components"]}).validate(content)


def _operation(document: str, method: str, path: str) -> dict[str, Any]:
    """The operation of a path, which may have ids where the document has `{id}`."""
    paths = _document(document)["paths"]
    requested = path.split("/")
    matching = [
        declared for declared in paths if _matches(declared.split("/"), requested) and method.lower() in paths[declared]
    ]
    assert matching, f"{document} has no {method} {path}"
    return paths[min(matching, key=lambda declared: declared.count("{"))][method.lower()]


def _matches(declared: list[str], requested: list[str]) -> bool:
    return len(declared) == len(requested) and all(
        expected == actual or (expected.startswith("{") and (actual.isdigit() or expected == actual))
        for expected, actual in zip(declared, requested, strict=True)
    )


def _as_sent(kind: str | None, value: str) -> object:
    if kind in {"integer", "boolean", "number"}:
        return json.loads(value)
    return [value] if kind == "array" else value


@cache
def _document(name: str) -> dict[str, Any]:
    return _nullable(corrected(name))


def _nullable(schema: Any) -> Any:
    """Translate OpenAPI 3.0's `nullable` into the type null of JSON Schema."""
    if isinstance(schema, list):
        return [_nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _nullable(part) for name, part in schema.items()}
    if plain.get("nullable") is True and isinstance(plain.get("type"), str):
        plain["type"] = [plain["type"], "null"]
    return plain
