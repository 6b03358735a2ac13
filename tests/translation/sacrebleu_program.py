"""What sacreBLEU's own command line prints."""

import subprocess
import sys
from pathlib import Path


def run_sacrebleu(*arguments: str | Path) -> str:
    """Its output, scores to 12 digits."""
    command = [sys.executable, "-m", "sacrebleu", *map(str, arguments), "-w", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
