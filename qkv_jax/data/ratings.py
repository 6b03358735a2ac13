"""Who rated what, and when: histories of items, for recommenders that predict the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qkv_jax.data.buckets import Shape
from qkv_jax.data.errors import DataError
from qkv_jax.data.files import read_lines
from qkv_jax.data.packing import pack
from qkv_jax.data.splits import Splits

FORM = "user::item::rating::time"


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings in the form of MovieTweetings and MovieLens, `user::item::rating::time` a line.

    A rating counts as a visit, whatever its height. The last item of each user is the test, the
    last but one is to validate on, and what precedes them to learn from (leave one out).

    Attributes:
        directory: holds `ratings.dat`, and for the items' names `movies.dat`
            (`item::name::genres`), each plain or with .gz behind.
        core: users and items with fewer ratings are left out, again and again until each has so
            many (the k-core).
        longest: T, items of a row, and so the longest history the model looks back at.
    """

    directory: Path
    core: int = 5
    longest: int = 50

    def __post_init__(self):
        # One item to learn from, and two to hold out.
        if self.core < 3:
            raise ValueError(f"core must be at least 3; got {self.core}")
        if self.longest < 2:
            raise ValueError(f"longest must be at least 2; got {self.longest}")

    def load(self) -> Splits:
        """Histories in rows, items numbered from 1 in the order of their numbers in the file.

        Training rows hold the histories of several users, longer ones cut in pieces of T:
            items: (rows, T) int32, 0 where there is none.
            segments: (rows, T) int32, history k of the row is k, from 1; 0: no item.
        Held-out rows hold a user each:
            items, segments: (users, T), what the user's last T items before the target are.
            target: (users,) int32, the item that comes next.
            seen: (users, W) int32, all that the user has rated before, then 0.

        Raises:
            DataError: a file is missing, or a line not of this form; nothing is left of the core.
        """
        path = _find(self.directory, "ratings.dat")
        users, items, times = _parse(path)
        kept = _core(users, items, self.core)
        if not kept.any():
            raise DataError(
                f"{path}: no user and item have {self.core} ratings each among each other; "
                "use a smaller core"
            )
        users, items, times = users[kept], items[kept], times[kept]
        known, items = np.unique(items, return_inverse=True)
        histories = _histories(users, items.astype(np.int32) + 1, times)
        report = (
            f"{path.name}: {len(items):,} ratings, {len(histories):,} users, "
            f"{len(known):,} items, each with {self.core} ratings or more"
        )
        return Splits(
            train=_packed([h[:-2] for h in histories], self.longest),
            valid=_held_out([h[:-1] for h in histories], self.longest),
            test=_held_out(histories, self.longest),
            sizes={"items": len(known)},
            names=("", *_names(self.directory, known)),
            report=(report,),
        )


def _find(directory: Path, name: str) -> Path:
    path = Path(directory) / name
    zipped = path.with_name(f"{name}.gz")
    return zipped if zipped.is_file() and not path.is_file() else path


def _parse(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and times, (ratings,) int64, in the file's order."""
    rows = [line.split("::") for line in read_lines(path)]
    for number, row in enumerate(rows, start=1):
        if len(row) != 4 or not all(row[i].isdecimal() for i in (0, 1, 3)):
            raise DataError(
                f"{path}, line {number}: expected {FORM}, in whole numbers; "
                f"got {'::'.join(row)[:60]!r}"
            )
    table = np.array([(row[0], row[1], row[3]) for row in rows], np.int64)
    users, items, times = table.reshape(-1, 3).T
    return users, items, times


def _core(users: np.ndarray, items: np.ndarray, least: int) -> np.ndarray:
    """Which ratings are of users and items that have `least` each among those that stay."""
    users, items = (np.unique(ids, return_inverse=True)[1] for ids in (users, items))
    kept = np.ones(len(users), bool)
    while True:
        often = [
            np.bincount(ids[kept], minlength=len(ids))[ids] >= least
            for ids in (users, items)
        ]
        fewer = kept & often[0] & often[1]
        if fewer.sum() == kept.sum():
            return kept
        kept = fewer


def _histories(
    users: np.ndarray, items: np.ndarray, times: np.ndarray
) -> list[np.ndarray]:
    """The items of each user by time; of one time, in the file's order."""
    order = np.lexsort((times, users))
    ends = np.flatnonzero(np.diff(users[order])) + 1
    return np.split(items[order], ends)


def _packed(histories: Sequence[np.ndarray], longest: int) -> dict[str, np.ndarray]:
    pieces = [
        history[max(0, end - longest) : end]
        for history in histories
        for end in range(len(history), 0, -longest)
    ]
    lengths = np.array([len(piece) for piece in pieces])
    rows = pack(lengths, lengths, Shape(longest, longest))
    items = np.zeros((len(rows), longest), np.int32)
    segments = np.zeros_like(items)
    for row, members in enumerate(rows):
        at = 0
        for k, piece in enumerate(members[members >= 0], start=1):
            end = at + lengths[piece]
            items[row, at:end], segments[row, at:end] = pieces[piece], k
            at = end
    return {"items": items, "segments": segments}


def _held_out(histories: Sequence[np.ndarray], longest: int) -> dict[str, np.ndarray]:
    before = [history[:-1] for history in histories]
    items = _filled([history[-longest:] for history in before], longest)
    return {
        "items": items,
        "segments": (items > 0).astype(np.int32),
        "target": np.array([history[-1] for history in histories], np.int32),
        "seen": _filled(before, max(map(len, before))),
    }


def _filled(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.int32)
    for place, row in zip(out, rows):
        place[: len(row)] = row
    return out


def _names(directory: Path, known: np.ndarray) -> list[str]:
    """The items' names; their numbers where there is no file of them."""
    path = _find(directory, "movies.dat")
    named = {}
    if path.is_file():
        for line in read_lines(path):
            number, _, rest = line.partition("::")
            named[number.lstrip("0")] = rest.partition("::")[0]
    return [named.get(str(item), str(item)) for item in known]
