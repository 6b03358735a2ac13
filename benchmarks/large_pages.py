"""How much faster does a CPU train where memory comes in large pages?

    python -m benchmarks.large_pages

Two processes hold our train step of `benchmarks.train_step`, one started with
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, as `qkv-jax` starts itself, the other with 0. They take turns, a
few updates each.
"""

import os
from contextlib import ExitStack

import numpy as np
import tyro

from benchmarks.train_step import Setup, alternate, started

KINDS = {"small": "0", "large": "1"}


def main(setup: Setup, *, rounds: int = 15, steps: int = 4) -> None:
    """Large pages against small ones.

    Args:
        setup: the model and the batch.
        rounds: turns of each.
        steps: updates of a turn.
    """
    with ExitStack() as stack:
        sides = []
        for number in KINDS.values():
            os.environ["GLIBC_TUNABLES"] = f"glibc.malloc.hugetlb={number}"
            sides.append(stack.enter_context(started("ours", setup)))
        seconds = alternate(sides, rounds, steps)
    small, large = medians = np.median(seconds, axis=(1, 2))
    print(setup)
    for kind, median in zip(KINDS, medians):
        print(f"{kind} pages: {median * 1e3:8.1f} ms an update")
    print(f"small / large: {small / large:.2f}x")


if __name__ == "__main__":
    tyro.cli(main)
