"""The floor of recommendation: every user is offered what most users have rated.

    python -m benchmarks.popularity ../shared/data/movietweetings100k

Counts are of all ratings but the held-out one of each user. Both conventions are printed: items
that the user has rated before left out of the ranking (which `tasks.ranking` does), or left in.
"""

import argparse
from pathlib import Path

from qkv_jax.data.ratings import Ratings
from qkv_jax.tasks.ranking import Ranking, popularity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of ratings.dat")
    parser.add_argument("--core", type=int, default=5)
    options = parser.parse_args()
    splits = Ratings(directory=options.directory, core=options.core).load()
    print(*splits.report, sep="\n")
    for part in ("valid", "test"):
        arrays = getattr(splits, part)
        outputs = {"scores": popularity(arrays, splits.sizes["items"])}
        for exclude in (True, False):
            metrics = Ranking(exclude_seen=exclude)(outputs, arrays)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"{part:>5}, seen items left {'out' if exclude else 'in '}  {shown}")


if __name__ == "__main__":
    main()
