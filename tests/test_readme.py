"""What the README shows, runs."""

import re
import subprocess
import sys
from pathlib import Path

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
