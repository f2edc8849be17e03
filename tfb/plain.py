"""Plain JSON data, read strictly: as it was written, and of the types it should have."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

_WORDS = {float: "a finite number", int: "a whole number", str: "text", tuple: "a list"}


def parse_json(data: bytes | str, **options: Any) -> Any:
    """Return what JSON in UTF-8 says; options are those of ``json.loads``.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not JSON, nested too deep to be read, or a key twice in one object.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        return json.loads(text, object_pairs_hook=_object, **options)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path) -> Any:
    """Read a JSON file, which has no NaN and no infinity.

    Raises:
        ValueError: it has, or is not JSON; see :func:`parse_json`.
        OSError: no such file.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    return parse_json(path.read_bytes(), parse_constant=refuse)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {shortened(repeated(key for key, _ in pairs))} stands twice")
    return found


def repeated(names: Iterable[Hashable]) -> Hashable | None:
    """Return the first name that stands twice, if one does."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of plain data, in hex, however a file lays it out.

    Raises:
        ValueError: it holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def typed(kind: Any, value: Any, name: str = "") -> Any:
    """Return plain data as a value of a type: lists as tuples, objects as dataclasses.

    Fields that a dataclass does not know are passed over; whole numbers are floats too.

    Args:
        kind: a JSON type, ``Any``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]``, or a
            dataclass of these.
        value: what ``json`` returns.
        name: of the value, for messages; none for a whole document.

    Raises:
        ValueError: another type, a missing field, a number that is not finite or a whole one of
            more than 64 bits, or what the dataclass refuses.
    """
    args = get_args(kind)
    if kind is Any or (value is None and NoneType in args):
        return value
    if NoneType in args:
        return typed(next(arg for arg in args if arg is not NoneType), value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, name)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: typed(args[1], item, f"{name}.{key}") for key, item in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(typed(k, v, name) for k, v in zip(kinds, value, strict=True))
    if kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is kind and (kind is not int or abs(value) < 1 << 64):
        return value
    expected = _WORDS.get(get_origin(kind) or kind, "an object")
    raise ValueError(f"{name or 'content'}: expected {expected}, got {shortened(value)}")


def _record(kind: Any, value: dict[str, Any], name: str) -> Any:
    """Return an object as a dataclass."""
    types, found = get_type_hints(kind), {}
    for field in fields(kind):
        path = f"{name}.{field.name}" if name else field.name
        if field.name in value:
            found[field.name] = typed(types[field.name], value[field.name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{path} is missing")
    try:
        return kind(**found)
    except ValueError as error:  # its own checks
        raise ValueError(f"{name}: {error}" if name else str(error)) from error
