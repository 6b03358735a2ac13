"""The run directory: what makes a new one, what may be resumed, what is left alone."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qkv_jax.training.errors import RunError

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
_SHOWN_DIFFERENCES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lies.

    Attributes:
        directory: of the run; None: runs/<name of the experiment>.
        seeds: runs to train, of as many seeds from training.seed on, in directory/seed-<seed>;
            their mean is the result. 1: one run, in the directory itself.
        watts: electric power of all the run's machines, for the energy in its model card; None:
            one is assumed by the kind of the devices, and stated.
    """

    directory: Path | None = None
    seeds: int = 1
    watts: float | None = None

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1; got {self.seeds}.")
        if self.watts is not None and not self.watts > 0:
            raise ValueError(f"watts must be positive, or None; got {self.watts}.")


def open_run(
    directory: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    restated: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Literal["new", "resume"]:
    """Creates a run directory, or makes sure that the one there may go on.

    Args:
        directory: the run's own; absent, empty, or one that this function made.
        config: JSON-able, the resolved configuration; written to config.json of a new run.
        restated: what is in a config.json, with the defaults of fields that there were none of when
            it was written.

    Returns:
        "new", or "resume" where config.json is there with equal content and the run is not
        finished.

    Raises:
        RunError: the run is finished, or has another configuration, or the directory is not a
            run. Nothing is changed then.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))
    if not _prepare(directory):
        _write_json(directory / CONFIG_FILE, config)
        return "new"
    there = json.loads(json.dumps(restated(read_config(directory))))
    _refuse(directory, _differences(there, config))
    if is_finished(directory):
        raise RunError(
            f"{directory} is a finished run: use `qkv-jax evaluate {directory}` or "
            f"`qkv-jax translate {directory}`, or choose another --run.directory to train again."
        )
    return "resume"


def check_config(directory: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Makes sure that a run has this configuration, whatever else makes it what it is.

    Raises:
        RunError: it has another one; or the directory is not a run.
    """
    there = read_config(directory)
    here = json.loads(json.dumps(config))
    _refuse(
        directory, _differences({n: x for n, x in there.items() if n in here}, here)
    )


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes out of a run; the system ends the lock with the process.

    Where the file system has no locks, nothing is kept out.

    Raises:
        RunError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows.
        yield
        return
    with (Path(directory) / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{directory} is in use by another process: wait for it to end, or choose "
                "another --run.directory."
            ) from None
        except OSError:
            pass
        yield


def finish_run(directory: str | os.PathLike, result: Mapping[str, Any]) -> None:
    """Writes result.json, which marks the run as finished; the last thing a run does."""
    _write_json(Path(directory) / RESULT_FILE, result)


def is_finished(directory: str | os.PathLike) -> bool:
    """Whether the run has its result.json."""
    return (Path(directory) / RESULT_FILE).exists()


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The configuration a run was made with.

    Raises:
        RunError: there is no readable config.json.
    """
    file = Path(directory) / CONFIG_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{directory} is not a run: it has no {CONFIG_FILE}.") from None
    except (ValueError, OSError) as error:
        raise RunError(
            f"{file} cannot be read ({error}): restore it, or use another run."
        ) from error


def _refuse(directory: str | os.PathLike, differing: list[str]) -> None:
    if not differing:
        return
    shown = "; ".join(differing[:_SHOWN_DIFFERENCES])
    more = len(differing) - _SHOWN_DIFFERENCES
    raise RunError(
        f"{directory} is a run of another configuration ({shown}"
        f"{f'; and {more} more' if more > 0 else ''}): use its options to resume it, "
        "or choose another --run.directory."
    )


def run_kind(directory: str | os.PathLike) -> str | None:
    """What class of configuration a run was made with; None: the directory is no run."""
    try:
        content = json.loads((Path(directory) / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def _prepare(directory: Path) -> bool:
    """Makes the directory where needed; True where it holds a config.json already."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise RunError(
            f"{directory} cannot be a run directory ({error.strerror}): "
            "choose another --run.directory."
        ) from error
    if CONFIG_FILE in names:
        return True
    # A run killed while it wrote its first file leaves only that file's temporary twin.
    if names - {CONFIG_FILE + ".tmp"}:
        raise RunError(
            f"{directory} is not empty and not a run (no {CONFIG_FILE}): "
            "choose another --run.directory."
        )
    return False


def write_text(file: Path, text: str) -> None:
    """Writes a file of a run so that at any moment it is the old one or the new."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_text(file, text)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """'training.steps: 100 there, 200 here', for each leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            found += _differences(
                there.get(key, "absent"), here.get(key, "absent"), inner
            )
        return found
    if there == here:
        return []
    return [f"{name}: {_short(there)} there, {_short(here)} here"]


def _short(value: Any, width: int = 40) -> str:
    text = value if value == "absent" else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else text[: width - 3] + "..."
