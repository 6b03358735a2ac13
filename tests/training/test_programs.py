"""Compiled programs on disk, in processes of their own: JAX looks for their place once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from qkv_jax.training import keep_programs
print(keep_programs(pathlib.Path(sys.argv[1])))
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
)
print(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.arange(5.0)).sum(), len(hits))
"""


def run(directory, program=PROGRAM, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(directory)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    place, result = done.stdout.splitlines()
    value, hits = result.split()
    return None if place == "None" else Path(place), float(value), int(hits)


def test_a_second_process_compiles_nothing_anew(tmp_path):
    place, value, hits = run(tmp_path / "new" / "programs")
    assert place.is_relative_to(tmp_path)
    assert any(place.iterdir())
    assert hits == 0
    again, same, hits = run(tmp_path / "new" / "programs")
    assert (again, same) == (place, value)
    assert hits > 0


def test_programs_that_were_cut_short_are_compiled(tmp_path):
    place, value, _ = run(tmp_path)
    for file in place.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert run(tmp_path) == (place, value, 0)


def test_a_place_that_cannot_be_written_to_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    place, value, _ = run(tmp_path / "file" / "programs")
    assert place is None
    assert value == run(tmp_path)[1]


def test_without_room_nothing_is_kept(tmp_path):
    full = "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(1, 1, 0)\n"
    place, _, _ = run(tmp_path, full + PROGRAM)
    assert place is None
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_oldest_programs_go(tmp_path):
    place, _, _ = run(tmp_path)
    old, new = place / "old", place / "new"
    for file, age in ((old, 2e9), (new, 1e9)):
        file.write_bytes(bytes(600))
        time = file.stat().st_mtime_ns - int(age)
        os.utime(file, ns=(time, time))
    for file in [*place.iterdir()]:
        if file not in (old, new):
            file.unlink()
    small = "from qkv_jax.training import programs\nprograms.MOST_BYTES = 1000\n"
    run(tmp_path, small + PROGRAM)
    assert not old.exists()
    assert new.exists()


def test_a_place_that_the_user_told_jax_of_holds(tmp_path):
    own = tmp_path / "own"
    place, _, _ = run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(own))
    assert place is None
    assert not (tmp_path / "ours").exists()
