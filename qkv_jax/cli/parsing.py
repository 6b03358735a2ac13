"""From arguments to typed options, by tyro; files of lines; and how a mistake is said."""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

PROGRAM = "qkv-jax"


class UsageError(ValueError):
    """The command line is wrong; the message is one line."""


def load_experiment(path: Path) -> Any:
    """The CONFIG of an experiment file."""
    if not path.is_file():
        files = [*Path("experiments").rglob("*.py"), *path.parent.glob("*.py")]
        there = {file.stem: file for file in files}
        near = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.6)
        hint = f": did you mean {there[near[0]]}?" if near else ""
        raise UsageError(f"there is no experiment file {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Where classes of the file itself are looked up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{path} cannot be loaded: {error}") from error
    config = getattr(module, "CONFIG", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"{path} defines no CONFIG")
    return config


def parse(name: str, kind: Any, arguments: list[str], default: Any = None) -> Any:
    """The options of a command, typed by tyro; a mistake is one line."""
    known = ["--help", *_options(kind, default)]
    for argument in itertools.takewhile(lambda text: text != "--", arguments):
        option = argument.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            raise UsageError(f"unknown option {option}{nearest(option, known)}")
    _describe_each(kind, default)
    printed = io.StringIO()
    keywords = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind,
                prog=f"{PROGRAM} {name}",
                args=arguments,
                config=(tyro.conf.AvoidSubcommands,),
                **keywords,
            )
    except SystemExit as error:
        if not error.code:
            raise
        message = _one_line(printed.getvalue())
        own = f"Error parsing {kind.__name__}: "
        raise UsageError(message.removeprefix(own)) from None
    except ValueError as error:
        raise UsageError(str(error)) from error


def _options(kind: Any, default: Any, prefix: str = "") -> Iterable[str]:
    """The options of a dataclass: --steps, --training.steps of nested ones, --no-exact."""
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        value = getattr(default, field.name, field.default)
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            if isinstance(value, bool):
                yield f"--{prefix}no-{name}"


def _describe_each(kind: Any, default: Any) -> None:
    """What a docstring says of several attributes at once is said of each: tyro wants it so."""
    for owner in kind.__mro__:
        if dataclasses.is_dataclass(owner):
            owner.__doc__ = _TOGETHER.sub(_apart, inspect.cleandoc(owner.__doc__ or ""))
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name, field.default)
        if dataclasses.is_dataclass(value):
            _describe_each(type(value), value)


_TOGETHER = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def _apart(described: re.Match[str]) -> str:
    names, text = described.groups()
    said = f"{names.replace('_', '-')}: {text}"
    return "\n".join(f"    {name}: {said}" for name in names.split(", "))


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""


def _one_line(text: str) -> str:
    """What tyro's boxed message says first: up to a blank line, or a rule within the box."""
    lines = [line.strip("│ ") for line in text.strip().splitlines()[1:]]
    rules = "─╰╯-"
    body = itertools.dropwhile(lambda line: not line.strip(rules), lines)
    said = itertools.takewhile(lambda line: line.strip(rules), body)
    return " ".join(said) or " ".join(text.split())


def is_unicode(text: str) -> bool:
    """False for an argument of other bytes, which Python hands on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: Path | None) -> list[str]:
    """Lines of a UTF-8 file or of standard input; only a line feed ends a line."""
    from qkv_jax.data import DataError

    name = "standard input" if path is None else str(path)
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: not UTF-8 ({error.reason})"
            ) from error
    return texts


def write_lines(path: Path | None, lines: Sequence[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    if path is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
