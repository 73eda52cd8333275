"""Parts by ``_target_``: from a configuration node to a typed object, with errors that name the key.

A part is a dataclass. Its config group is the registry: ``_target_`` names the class, the other keys are
its fields. A user's own class in a user's own package works the same way.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from align_loop.errors import UserError

PART = {"part": True}  # metadata of a field whose value is a part: its class is named by ``_target_``

_STRICT_ENOUGH = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" for a misspelt name, or the list of what is known."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def find(target: Any, path: str) -> type:
    """The class that ``_target_`` names; ``UserError`` where there is none."""
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"{path}._target_={target!r} must be a dotted name like package.module.Class")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}._target_={target}: no module {error.name!r}; is the package installed?") from None
    except AttributeError:
        classes = [key for key in vars(importlib.import_module(module)) if key[:1].isupper()]
        raise UserError(f"{path}._target_={target}: {module} has no {name}; {nearest(name, classes)}") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{path}._target_={target} is not a dataclass; a part is one, its fields are its keys")
    return found


def part(node: Any, path: str) -> Any:
    """The part that ``node`` (a mapping with ``_target_``) describes."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path}={node!r} must be a part: a mapping with _target_ and the part's fields")
    fields = {key: value for key, value in node.items() if key != "_target_"}
    return build(find(node["_target_"], path), fields, path)


def build(cls: type, node: Any, path: str) -> Any:
    """An object of the dataclass ``cls`` from a mapping; unknown keys, wrong types and bad values are ``UserError``."""
    if not isinstance(node, Mapping):
        raise UserError(f"{path}={node!r} must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in node:
        if key not in fields:
            raise UserError(f"{_join(path, key)}={_shown(node[key])}: unknown key; {nearest(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    missing = [n for n, f in fields.items() if n not in node and _required(f)]
    if missing:
        raise UserError(f"{_join(path, missing[0])} is missing; give it a value ({_name(hints[missing[0]])})")
    values = {}
    for name in [n for n in fields if n in node]:  # in the class's order, so that what others refer to comes first
        is_part = fields[name].metadata.get("part")
        values[name] = _value(hints[name], node[name], _join(path, name), is_part)
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error).replace(f"{cls.__name__}.", f"{path}.", 1)  # where a class doesn't know its key
        raise UserError(f"{path}: {text}" if path and path not in text else text) from None


def node_of(obj: Any) -> dict[str, Any]:
    """The JSON-able configuration of a part, with its ``_target_``: what goes into a stage's key."""
    cls = type(obj)
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **plain(obj)}


def plain(obj: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (integer keys become text); parts in its fields keep their ``_target_``."""
    return {f.name: _plain(getattr(obj, f.name), f.metadata.get("part")) for f in dataclasses.fields(obj)}


def code_of(obj: Any) -> list[str]:
    """Dotted names of the code behind a part: its class, the parts in its fields, and what its ``code()`` names.

    ``code()`` is for a part that calls a user's function: it returns names like ``package.module:function``.
    """
    cls = type(obj)
    found = [f"{cls.__module__}.{cls.__qualname__}", *(obj.code() if hasattr(obj, "code") else [])]
    for f in dataclasses.fields(obj):
        value = getattr(obj, f.name) if f.metadata.get("part") else None
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        for part_within in inner:
            found += code_of(part_within) if part_within is not None else []
    return found


def _plain(value: Any, is_part: bool | None = None) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return node_of(value) if is_part else plain(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, is_part) for k, v in value.items()}
    return [_plain(v, is_part) for v in value] if isinstance(value, (list, tuple)) else value


def _value(hint: Any, value: Any, path: str, is_part: bool | None) -> Any:
    """One field's value, converted to its type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in arguments:
        if value is None:
            return None
        rest = [a for a in arguments if a is not type(None)]
        if len(rest) == 1:
            return _value(rest[0], value, path, is_part)
    if is_part:
        if origin is dict:
            if not isinstance(value, Mapping):
                raise UserError(f"{path}={_shown(value)} must be a dict of parts")
            return {k: part(v, _join(path, k)) for k, v in value.items() if v is not None}
        if origin is list:
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{path}={_shown(value)} must be a list of parts")
            return [part(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return part(value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if origin is list and typing.get_origin(arguments[0]) is typing.Literal and isinstance(value, (list, tuple)):
        return [_leaf(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin in (dict, list) and dataclasses.is_dataclass(arguments[-1]):
        return _collection(origin, arguments, value, path)
    return _leaf(hint, value, path)


def _collection(origin: type, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    """A list or mapping whose values are dataclasses."""
    if not isinstance(value, Mapping if origin is dict else list):
        raise UserError(f"{path}={_shown(value)} must be a {origin.__name__}")
    if origin is list:
        return [build(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    return {k: build(arguments[1], v, _join(path, k)) for k, v in value.items()}


def _leaf(hint: Any, value: Any, path: str) -> Any:
    if hint is int and isinstance(value, bool) or hint is str and not isinstance(value, str):
        raise UserError(f"{path}={_shown(value)}: must be {_name(hint)}")
    try:
        return TypeAdapter(hint, config=_STRICT_ENOUGH).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if typing.get_origin(hint) is typing.Literal:
            choices = [str(a) for a in typing.get_args(hint)]
            raise UserError(f"{path}={_shown(value)}: {nearest(str(value), choices)}") from None
        raise UserError(f"{path}={_shown(value)}: must be {_name(hint)} ({first['msg'].lower()})") from None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _name(hint: Any) -> str:
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
