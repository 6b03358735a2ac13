"""Configurations as JSON's types, and back."""

import dataclasses
import importlib
import types
import typing
from pathlib import Path
from typing import Any

PACKAGE = "qkv_jax"


def to_plain(value: Any, kind: Any = None) -> Any:
    """A dataclass of dataclasses, tuples, paths and plain values, in JSON's types.

    An object carries the name of its class; and of its module, where `kind`, the type that its
    place has, does not tell it.
    """
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return str(value) if isinstance(value, Path) else value
    own = type(value)
    hints = typing.get_type_hints(own)
    content: dict[str, Any] = {"kind": own.__name__}
    if kind is Any or _named_so(kind, own.__name__)[:1] not in ([], [own]):
        content["module"] = own.__module__
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        content[field.name] = to_plain(part, hints[field.name])
    return content


def from_plain(kind: Any, content: Any) -> Any:
    """What `to_plain` made the content from.

    Args:
        kind: the type it had: a dataclass, a union of them, a tuple, a path, or a plain one.
            Any: as the content says, if that is a dataclass of this package.
        content: in JSON's types.

    Raises:
        ValueError, TypeError, KeyError, StopIteration: it is of no such kind.
    """
    if kind is Any and isinstance(content, dict) and "module" in content:
        kind = _named(content["module"], content["kind"])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if content is None:
            return None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if isinstance(content, dict):
            kinds = _named_so(kind, content["kind"])
            module = content.get("module", kinds[0].__module__ if kinds else "")
            kinds = [k for k in kinds if k.__module__ == module]
        return from_plain(next(iter(kinds)), content)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {n: x for n, x in content.items() if n not in ("kind", "module")}
        parts = {name: from_plain(hints[name], x) for name, x in fields.items()}
        return kind(**parts)  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        return tuple(content)
    return Path(content) if kind is Path else content


def _named_so(kind: Any, name: str) -> list[Any]:
    """The types of a union that have a name; models' configurations share theirs."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return []
    return [k for k in typing.get_args(kind) if getattr(k, "__name__", "") == name]


def _named(module: str, name: str) -> Any:
    """A class of this package: no other module is imported because a file says so."""
    if module.split(".")[0] != PACKAGE:
        raise ValueError(f"{name} is of {module}, which is not in {PACKAGE}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {name} in {module}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{module}.{name} is no configuration")
    return found
