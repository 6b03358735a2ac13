"""Lines of text files, plain or gzip, and where the cache lies."""

import difflib
import gzip
import os
import tempfile
import zlib
from pathlib import Path

from qkv_jax.data.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"


def cache_directory() -> Path:
    """Return `QKV_JAX_CACHE`, or `qkv_jax` in the user's cache; it may not exist yet."""
    chosen = os.environ.get("QKV_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "qkv_jax"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, gzip or not, without their ends.

    Only LF and CR LF end a line. Other separators that `str.splitlines` knows
    (U+2028, U+0085, form feed) occur inside sentences, and would shift one file
    of a parallel pair against the other.

    Raises:
        DataError: the file is missing, unreadable, cut short, or not UTF-8.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset counts from behind a byte order mark, which holds no line end.
        bom = 3 if content.startswith(b"\xef\xbb\xbf") else 0
        start = error.start + bom
        number = content.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}, line {number}: byte 0x{content[start]:02x} is not UTF-8; "
            f"convert the file, for example with iconv -t UTF-8"
        ) from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def missing_file(path: Path) -> DataError:
    """Return the error for a path that does not exist, naming what lies near it."""
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"{path} does not exist: there is no directory {parent}")
    names = sorted(entry.name for entry in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, cutoff=0.4) or names[:5]
    hint = f"did you mean {' or '.join(near)}?" if near else "the directory is empty"
    return DataError(f"{path} does not exist in {parent}; {hint}")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, and of a gzip file those that are packed in it.

    Raises:
        DataError: the file is missing, unreadable or cut short.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not content.startswith(_GZIP_MAGIC):
        if path.suffix == ".gz" and content:
            raise DataError(f"{path} ends in .gz but is not a gzip file; rename it")
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file ({error}); fetch it again"
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or none, whoever else writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
