"""The model card: what a finished run was made of, what it gave and what it cost, on one page."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qkv_jax import __version__

CARD_FILE = "model_card.md"
# Watts of a core in use of a processor that is not known (Lannelongue et al. 2021, arXiv 2007.07610,
# whose tool has this value for "any").
CORE_WATTS = 12.0
# Watts of an accelerator by a part of its name, the first that fits: the boards' limits in their
# makers' data sheets, the TPUs' mean power; the last, of "any", as above.
DEVICE_WATTS = (
    ("H200", 700.0),
    ("H100", 700.0),
    ("A100", 400.0),
    ("L40", 300.0),
    ("L4", 72.0),
    ("T4", 70.0),
    ("V100", 300.0),
    ("TPU v2", 280.0),
    ("TPU v3", 220.0),
    ("TPU v4", 170.0),
    ("", 200.0),
)


class Section(NamedTuple):
    """A part of a card.

    Attributes:
        title: of the part.
        text: Markdown.
    """

    title: str
    text: str


class Power(NamedTuple):
    """What a run is taken to draw.

    Attributes:
        watts: of all its machines.
        method: where the number comes from.
    """

    watts: float
    method: str


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in lines)


def code_version() -> str:
    """The commit of the package's checkout; outside of one, the package's version."""
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    # A repository that merely contains an installed package does not track it.
    tracked = _git(root, "ls-files", "qkv_jax/__init__.py")
    if not commit or not tracked:
        return f"qkv-jax {__version__}, not in a git checkout"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    more = ", with changes that are not committed" if changed else ""
    return f"qkv-jax {__version__}, commit {commit}{more}"


def assumed_power(watts: float | None) -> Power:
    """What the run's machines draw.

    Args:
        watts: as the user says; None: by the kind of the devices.
    """
    if watts is not None:
        return Power(watts, f"{watts:g} W, as given by --run.watts")
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        cores = _cores() * jax.process_count()
        return Power(
            cores * CORE_WATTS,
            f"{cores} cores x {CORE_WATTS:g} W, assumed for any processor in full use (arXiv "
            "2007.07610); memory and cooling are left out; --run.watts says it better",
        )
    each = next(watts for name, watts in DEVICE_WATTS if name in device.device_kind)
    return Power(
        count * each,
        f"{count} x {each:g} W, assumed for {device.device_kind} in full use; the host and cooling "
        "are left out; --run.watts says it better",
    )


def hardware() -> Section:
    """The machine, as far as it can be asked."""
    device = jax.devices()[0]
    rows = [
        (
            "processor",
            f"{_processor()}, {_cores()} of {os.cpu_count()} cores used here",
        ),
        ("devices", f"{jax.device_count()} x {device.device_kind} ({device.platform})"),
        ("processes", jax.process_count()),
        ("system", platform.platform()),
        ("software", f"Python {platform.python_version()}, jax {jax.__version__}"),
    ]
    return Section("Hardware", table(("", ""), rows))


def cost(*, loop: float, rest: float, power: Power) -> Section:
    """Time and energy.

    Args:
        loop: seconds of the training loop, all parts of the run.
        rest: seconds of this part outside of it.
        power: of the machines.
    """
    seconds = loop + rest
    energy = power.watts * seconds / 3.6e6
    rows = [
        ("training and its evaluations, all parts of the run", duration(loop)),
        ("preparation and test, last part of the run", duration(rest)),
        ("energy, an estimate", f"{energy:.3g} kWh"),
        ("its method", f"{duration(seconds)} x {power.watts:g} W: {power.method}"),
    ]
    lost = "A part that was killed counts up to its last checkpoint, without its preparation."
    return Section("Time and energy", f"{table(('', ''), rows)}\n\n{lost}")


def numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The numbers of a nested mapping, by dotted names."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", f"{value:,.6g}"))
    return found


def array_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays: of their names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def line_digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text, each ended by a line feed: as `sha256sum` of their file."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def make_card(
    name: str,
    *,
    front: Mapping[str, Any],
    summary: str,
    sections: Sequence[Section],
    config: Mapping[str, Any],
) -> str:
    """The page, in Markdown, with the metadata that the Hugging Face hub reads before it.

    Args:
        name: of the run.
        front: that metadata, in JSON's types.
        summary: a few sentences.
        sections: in their order.
        config: what makes the run what it is.
    """
    metadata = {"library_name": "qkv-jax"} | dict(front)
    content = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    parts = [
        "---",
        *(f"{key}: {json.dumps(x, ensure_ascii=False)}" for key, x in metadata.items()),
        "---",
        f"\n# {name}\n\n{summary}",
        *(f"\n## {section.title}\n\n{section.text}" for section in sections),
        f"\n## Configuration\n\n```json\n{content}\n```",
    ]
    return "\n".join(parts) + "\n"


def duration(seconds: float) -> str:
    """Such as "1 h 05 min" or "12.3 s"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 120
        else f"{minutes} min"
    )


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _git(root: Path, *arguments: str) -> str:
    """What git says; empty where there is none, or it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
