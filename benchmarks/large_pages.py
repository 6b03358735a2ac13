"""How much faster does a CPU train where memory comes in large pages?

    python -m benchmarks.large_pages

Two processes hold our train step of `benchmarks.train_step`, one started with
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, as `qkv-jax` starts itself, the other with 0. They take turns, a
few updates each.
"""

import os
import statistics
from contextlib import ExitStack

import tyro

from benchmarks.train_step import Setup, started

KINDS = {"small": "0", "large": "1"}


def main(setup: Setup, *, rounds: int = 15, steps: int = 4) -> None:
    """Large pages against small ones.

    Args:
        setup: the model and the batch.
        rounds: turns of each.
        steps: updates of a turn.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        sides = {}
        for kind, number in KINDS.items():
            os.environ["GLIBC_TUNABLES"] = f"glibc.malloc.hugetlb={number}"
            sides[kind] = stack.enter_context(started("ours", setup))
        for _ in range(rounds):
            for kind, side in sides.items():
                side.send(steps)
                seconds[kind] += side.recv()
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(setup)
    for kind, median in medians.items():
        print(f"{kind} pages: {median * 1e3:8.1f} ms an update")
    print(f"small / large: {medians['small'] / medians['large']:.2f}x")


if __name__ == "__main__":
    tyro.cli(main)
