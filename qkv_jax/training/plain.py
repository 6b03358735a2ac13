"""Configurations as JSON's types, and back."""

import dataclasses
import importlib
import types
import typing
from pathlib import Path
from typing import Any

PACKAGE = "qkv_jax"


def to_plain(value: Any) -> Any:
    """A dataclass of dataclasses, tuples, paths and plain values, in JSON's types.

    An object where its field says no type carries the name of its class and of its module.
    """
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return str(value) if isinstance(value, Path) else value
    hints = typing.get_type_hints(type(value))
    content: dict[str, Any] = {"kind": type(value).__name__}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        content[field.name] = to_plain(part)
        if hints[field.name] is Any and dataclasses.is_dataclass(part):
            content[field.name]["module"] = type(part).__module__
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
        kinds = list(typing.get_args(kind))
        if isinstance(content, dict):
            kinds = [k for k in kinds if getattr(k, "__name__", "") == content["kind"]]
        elif content is None:
            return None
        return from_plain(next(k for k in kinds if k is not type(None)), content)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {n: x for n, x in content.items() if n not in ("kind", "module")}
        parts = {name: from_plain(hints[name], x) for name, x in fields.items()}
        return kind(**parts)  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        return tuple(content)
    return Path(content) if kind is Path else content


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
