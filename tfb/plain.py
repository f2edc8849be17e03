"""Plain data: JSON read strictly, as it was written and of the types it should have.

Also values, lists and errors in as many words as a message has room for.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

_WORDS = {float: "a finite number", int: "a whole number", str: "text", tuple: "a list"}


def parse_json(data: bytes | str) -> Any:
    """Return what JSON in UTF-8 says.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not JSON, nested too deep to be read, or a key twice in one object.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {shown(repeated(key for key, _ in pairs))} stands twice")
    return found


def repeated(names: Iterable[Hashable]) -> Hashable | None:
    """Return the first name that stands twice, if one does."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def shown(value: Any) -> str:
    """Return the beginning of a value as text, whatever it is."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits
        return f"a value of type {type(value).__name__}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, with dots in place of the others."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def told(error: BaseException) -> str:
    """Return the first line of an error that says something, with its class where that helps."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] + (f" {lines[1].strip()}" if lines[0][-1:] == ":" and lines[1:] else "")
    plain = isinstance(error, OSError | ValueError) or type(error) is RuntimeError
    return text[:300] if plain and text else f"{type(error).__name__}: {text[:300]}"


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of plain data, in hex, however a file lays it out.

    Raises:
        ValueError: it holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(was: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> list[str]:
    """Return the fields of ``now`` that were something else, as "field: was -> now"."""
    found = []
    for name, value in now.items():
        before = was.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            both = {**dict.fromkeys(before), **value}
            found += differences(before, both, f"{group}{name}.")
        elif before != value:
            found.append(f"{group}{name}: {before} -> {value}")
    return found


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
    raise ValueError(f"{name or 'content'}: expected {expected}, got {shown(value)}")


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
