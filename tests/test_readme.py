"""What the README shows, runs."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

from qkv_jax.cli import main

ROOT = Path(__file__).parents[1]


def test_the_readmes_example_runs_and_gives_every_slope_a_gradient():
    text = (ROOT / "README.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    slopes = [float(number) for number in done.stdout.strip("[]\n ").split()]
    assert len(slopes) == 4
    assert all(slopes)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_the_page_on_a_new_task_trains(tmp_path, capsys):
    page = (ROOT / "docs" / "new_task.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "films.py").write_text(code, encoding="utf-8")
    kinds = {"night of terror": "Horror", "my funny uncle": "Comedy|Family"}
    lines = [
        f"{i}::{title} {i} (1985)::{genres}\n"
        for i in range(20)
        for title, genres in kinds.items()
    ]
    movies = tmp_path / "movies.dat.gz"
    movies.write_bytes(gzip.compress("".join(lines).encode()))
    run = ["train", str(tmp_path / "films.py"), "--run.directory", str(tmp_path / "r")]
    options = {"training.steps": 8, "batch-rows": 8, "optimizer.warmup-steps": 1}
    options |= {"optimizer.peak-lr": 0.01, "training.evaluate-every": 8}
    given = [text for n, x in options.items() for text in (f"--{n}", str(x))]
    assert main([*run, *given, "--data.path", str(movies)]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["accuracy"] > 0.9
    assert main([*run, "--data.path", str(tmp_path / "films.py")]) == 2
    assert "must hold lines of id::Title" in capsys.readouterr().err
