"""Configurations: frozen dataclasses from TOML files and back, with errors that say what to write instead.

A field may be bool, int, float, str, Path, Literal, another dataclass (a table), tuple, list, dict with
string keys, or a union of these. TOML has no null, so None is left out: it has to be the field's default. Which
dataclass of a union a table is, a field says that is a Literal of one value in each: `model_type = "qwen3"`.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def load_toml(cls: type[T], path: Path) -> T:
    """The configuration in a TOML file. Raises OSError where there is none, ValueError where it is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    return from_dict(cls, values, where=str(path))


def from_dict(cls: type[T], values: Mapping[str, object], *, where: str) -> T:
    """A dataclass from plain values; ValueError, its message beginning with `where`, if one is wrong."""
    return cast(T, _dataclass(cls, values, _Place(where)))


def to_toml(config: object) -> str:
    """A dataclass as TOML that `load_toml` reads back as an equal one."""
    return "\n".join(_table(_items(config), ())).lstrip("\n") + "\n"


# ---- reading -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a value stands, for the complaint about it."""

    file: str
    keys: tuple[str, ...] = ()

    def __truediv__(self, key: str) -> _Place:
        return _Place(self.file, (*self.keys, key))

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file}: {'.'.join(self.keys)}{': ' if self.keys else ''}{message}")


def _dataclass(cls: type, values: object, place: _Place) -> object:
    if not isinstance(values, Mapping):
        raise _mismatch(values, "a table", place)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in values:
        if key not in known:
            raise place.error(_unknown_key(str(key), list(known)))
    missing = [name for name, field in known.items() if _required(field) and name not in values]
    if missing:
        raise place.error(f"missing {missing[0]!r}, which has no default")
    hints = get_type_hints(cls)
    arguments = {key: _convert(hints[key], value, place / key) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:  # the dataclass's own checks
        raise place.error(str(error)) from None


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _unknown_key(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")


def _convert(hint: Any, value: object, place: _Place) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_that_fits(arguments, value, place)
    if origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        raise _mismatch(value, _spelled(hint), place)
    if origin in (tuple, list):
        return _sequence(origin, arguments, value, place)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(value, "a table", place)
        return {str(key): _convert(arguments[1], item, place / str(key)) for key, item in value.items()}
    if is_dataclass(hint):
        return _dataclass(cast(type, hint), value, place)
    return _scalar(hint, value, place)


def _first_that_fits(options: tuple[Any, ...], value: object, place: _Place) -> object:
    present = [option for option in options if option is not NoneType]
    if isinstance(value, Mapping):
        present = _tagged(present, value, place) or present
    if len(present) == 1:
        return None if value is None else _convert(present[0], value, place)
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return _convert(option, value, place)
        except ValueError:
            continue
    raise _mismatch(value, " or ".join(_spelled(option) for option in present), place)


def _tagged(options: list[Any], table: Mapping[str, object], place: _Place) -> list[Any]:
    """The dataclasses whose tag the table has; the first one where it has none."""
    tags = {option: _tag(option) for option in options if is_dataclass(option)}
    named = {key for tag in tags.values() if tag is not None for key in (tag[0],) if key in table}
    if not named:
        return list(tags)[:1]
    (key,) = named
    fitting = [option for option, tag in tags.items() if tag == (key, table[key])]
    if not fitting:
        known = ", ".join(repr(tag[1]) for tag in tags.values() if tag is not None)
        raise (place / key).error(f"expected one of {known}, got {table[key]!r}")
    return fitting


def _tag(cls: Any) -> tuple[str, object] | None:
    """The first field of a dataclass that is a Literal of one value, and that value."""
    for name, hint in get_type_hints(cls).items():
        if get_origin(hint) is Literal and len(get_args(hint)) == 1:
            return name, get_args(hint)[0]
    return None


def _sequence(kind: type, hints: tuple[Any, ...], value: object, place: _Place) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _mismatch(value, "an array", place)
    endless = kind is list or hints[-1] is Ellipsis
    if not endless and len(value) != len(hints):
        raise place.error(f"expected an array of {len(hints)}, got {len(value)} values")
    each = [hints[0]] * len(value) if endless else hints
    return kind(_convert(hint, item, place / str(i)) for i, (hint, item) in enumerate(zip(each, value, strict=True)))


def _scalar(hint: Any, value: object, place: _Place) -> object:
    if hint is Path and isinstance(value, str | Path):
        return Path(os.path.expanduser(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint in (object, Any) or type(value) is hint or (hint is NoneType and value is None):
        return value
    raise _mismatch(value, _spelled(hint), place)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        Path: "a path (a string)",
    }
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _mismatch(value: object, expected: str, place: _Place) -> ValueError:
    got = "a table" if isinstance(value, Mapping) else f"{type(value).__name__} {value!r}"
    return place.error(f"expected {expected}, got {got}")


# ---- writing -----------------------------------------------------------------------------------------------


def _items(config: object) -> dict[str, object]:
    """The fields to write, by name; nothing for those that are None."""
    assert is_dataclass(config) and not isinstance(config, type), f"{config!r} is not a configuration"
    items = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    lost = [f.name for f in fields(config) if f.init and items[f.name] is None and f.default is not None]
    assert not lost, f"{type(config).__name__}: {lost} can be None without None being the default"
    return {name: value for name, value in items.items() if value is not None}


def _table(items: Mapping[str, object], path: tuple[str, ...]) -> Iterator[str]:
    """A table's lines: values first, since a line belongs to the header before it, then the tables in it."""
    inner = {key: value for key, value in items.items() if _is_table(value)}
    if path:
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in items.items():
        if key not in inner:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in inner.items():
        yield from _table(_as_items(value), (*path, key))


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or is_dataclass(value)


def _as_items(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else _items(value)


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes DEL too


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            return _string(str(value))
        case tuple() | list():
            return f"[{', '.join(map(_value, value))}]"
    assert _is_table(value), f"{value!r} has no form in TOML"
    return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in _as_items(value).items())}}}"
