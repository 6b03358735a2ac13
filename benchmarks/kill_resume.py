"""Is a run that was killed at random moments the run that it would have been?

    python -m benchmarks.kill_resume

`qkv-jax train` is started again and again on one directory and killed with SIGKILL at a moment drawn
at random, be it in its start, in a step, in an evaluation or in the writing of a checkpoint; at last
it is left to end. Its losses of all steps, parameters, moments, and the data's position must have
the bits of a run that nobody disturbed. Leaves with 1 where they have not.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tyro

CONFIG = '''"""A small run on files beside it."""

from pathlib import Path

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=ParallelData(directory=Path(__file__).parent, source="a", target="b"),
    text=TextConfig(vocabulary=300, batch_tokens=2048, max_source=48, max_target=48),
    model=seq2seq.Config(d_model=64, d_ff=128, heads=2, encoder_layers=1, decoder_layers=1),
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=100),
    training=TrainingConfig(
        steps={steps}, evaluate_every=100, checkpoint_every=25, log_every=5, ema_decay=0.99
    ),
)
'''


def write_corpus(directory: Path) -> None:
    """Lines of made-up words, and the same read backwards."""
    rng, words = random.Random(0), [f"word{i}" for i in range(200)]
    for part, count in (("train", 2000), ("valid", 20), ("test", 5)):
        lines = [rng.choices(words, k=rng.randint(1, 12)) for _ in range(count)]
        for name, way in (("a", 1), ("b", -1)):
            text = "".join(" ".join(line[::way]) + "\n" for line in lines)
            (directory / f"{part}.{name}").write_text(text, encoding="utf-8")


def start(root: Path, run: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qkv_jax", "train", str(root / "config.py")]
    return subprocess.Popen(
        [*command, "--run.directory", str(root / run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> None:
    """Waits for a run that nobody disturbs."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors}")


def steps_done(directory: Path) -> int:
    """The newest whole checkpoint."""
    names = (path.name for path in (directory / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def left_by(directory: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, its record but for the clock, and the losses."""
    warnings.filterwarnings("ignore", "Sharding info not provided")
    last = directory / "checkpoints" / str(steps_done(directory))
    found: dict[str, np.ndarray] = {}
    for item in sorted(
        path for path in last.iterdir() if (path / "_METADATA").exists()
    ):
        tree: Any = ocp.PyTreeCheckpointer().restore(item)
        for name, array in tree.items():
            found[f"{item.name}: {name}"] = np.asarray(array)
    content = json.loads((last / "progress" / "metadata").read_text())
    content.pop("seconds")
    found["progress"] = np.array(json.dumps(content, sort_keys=True))
    rows = [
        json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("train/loss", "validation/loss"):
        losses = [(row["step"], row[name]) for row in rows if name in row]
        found[name] = np.array(losses, np.float64)
    return found


def main(*, kills: int = 20, steps: int = 1500, seed: int | None = None) -> None:
    """Kills a run at random moments, and compares it with one that was left alone.

    Args:
        kills: how many.
        steps: of the run.
        seed: of the moments; None: another each time, and printed.
    """
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root)
        (root / "config.py").write_text(CONFIG.format(steps=steps), encoding="utf-8")
        began = time.perf_counter()
        process = start(root, "straight")
        while process.poll() is None and not steps_done(root / "straight"):
            time.sleep(0.05)
        first = time.perf_counter() - began
        ended(process)
        alone = time.perf_counter() - began
        print(
            f"seed {seed}; undisturbed: {steps} steps in {alone:.0f} s, the first checkpoint after "
            f"{first:.1f} s",
            flush=True,
        )
        # Uniform from the start to a time that takes the last kill to 0.7 of the run, on average.
        share = 1.4 * (alone - first) / kills
        latest = first + (share + (share**2 + 4 * share * first) ** 0.5) / 2
        for i in range(kills):
            process = start(root, "killed")
            moment = rng.uniform(0.5, latest)
            time.sleep(moment)
            early = process.poll() is not None
            process.kill()
            process.communicate()
            done = steps_done(root / "killed")
            print(f"kill {i + 1} after {moment:.1f} s: checkpoint {done}", flush=True)
            if early:
                raise SystemExit(
                    "the run ended before the last kill: give it more --steps."
                )
        ended(start(root, "killed"))
        one, other = (left_by(root / name) for name in ("straight", "killed"))
        differing = [
            name
            for name in sorted(one.keys() | other.keys())
            if name not in one
            or name not in other
            or one[name].tobytes() != other[name].tobytes()
        ]
        if differing:
            raise SystemExit(f"differ: {', '.join(differing)}")
        print(f"{len(one)} arrays, the record and the losses have the same bits")


if __name__ == "__main__":
    tyro.cli(main)
