"""Parallel text from a Hugging Face hub data set (extra `hub`)."""

from qkv_jax.data.errors import DataError
from qkv_jax.data.parallel import Pair, record_pair


def read_hub(
    name: str,
    split: str = "train",
    *,
    languages: tuple[str, str] | None = None,
    config: str | None = None,
) -> list[Pair]:
    """Return the (source, target) pairs of one split of a hub data set.

    Args:
        name: the data set, such as "bentrevett/multi30k".
        split: the split's name there.
        languages: (source, target): keys of a row, or of its "translation" object.
            None: a row has the keys "source" and "target".
        config: the data set's configuration, such as "de-en"; None: its default.

    Raises:
        DataError: `datasets` is not installed, the data set, configuration or split
            is not to be had, or a row holds no such pair.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"reading {name} from the hub needs the datasets library; "
            f"pip install 'qkv_jax[hub]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"hub data set {name}, split {split}: {reason}") from error
    pairs = [
        record_pair(
            row, languages, where=f"hub data set {name}, split {split}, row {i}"
        )
        for i, row in enumerate(rows)
    ]
    if not pairs:
        raise DataError(f"hub data set {name}, split {split} holds no sentences")
    return pairs
