"""What do compressed models cost, and what do they lose, beside the model they were made of?

    qkv-jax compress runs/multi30k runs/int8 --weights int8
    qkv-jax prune runs/multi30k runs/pruned --heads 0.3 --even-heads --feed-forward 0.5
    python -m benchmarks.efficiency runs/multi30k runs/int8 runs/pruned
    python -m benchmarks.efficiency runs/multi30k --kv-caches float int8

The first model is a run, on whose test part all are scored. Each row of the table has BLEU, the
numbers that were learned, bytes of the weights on disk (of a run, written as `qkv-jax compress
--weights float32` writes them, without what training needs) and in memory, the compiled search's
own memory beside them (what it unrounds, caches, states), target tokens a second in decoding, and
in training: of a quantised model, in training for it. Models take turns, first to last and last to
first, and each rate is the median of its turns.
"""

import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from qkv_jax import data, training
from qkv_jax.translation import Translator, evaluate_run, read_run, search
from qkv_jax.translation.compress import compress_model, disk_bytes
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import param_count
from qkv_jax.translation.start import WEIGHTS, Start, is_compressed, load_start

NUMBERS = ("parameters", "bytes on disk", "bytes in memory", "bytes of the search")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured.

    Attributes:
        run: the untouched model, a run.
        models: made of it: directories, or runs.
        sentences: of the test part that BLEU is measured on; None: all.
        decoded: sentences of a turn of decoding.
        rows, length: of a batch in training, padding included.
        steps: of a turn of training.
        rounds: turns of each model, after one that compiles.
        beams: of the search; None: as the run is configured.
        kv_caches: in what keys and values are remembered while decoding: a row of the table for
            each model and each of these.
    """

    run: tyro.conf.Positional[Path]
    models: tyro.conf.Positional[tuple[Path, ...]] = ()
    sentences: int | None = None
    decoded: int = 128
    rows: int = 64
    length: int = 24
    steps: int = 8
    rounds: int = 5
    beams: int | None = None
    kv_caches: tuple[Literal["float", "int8"], ...] = ("float",)


def main(setup: Setup) -> dict[str, dict[str, float]]:
    """Measures, prints the table, and returns its rows."""
    pairs = read_run(setup.run).data.load().test[: setup.sentences]
    starts = {str(path): load_start(path) for path in (setup.run, *setup.models)}
    beams = setup.beams or starts[str(setup.run)].decoding.beams
    mesh = training.make_mesh()
    translators = {
        row_name(name, kind): Translator(
            start.model,
            start.params,
            start.tokenizer,
            decoding=dataclasses.replace(start.decoding, beams=beams, kv_cache=kind),
            mesh=mesh,
            quantisation=start.quantisation,
        )
        for name, start in starts.items()
        for kind in setup.kv_caches
    }
    sources = [source for source, _ in pairs[: setup.decoded]]
    decode: dict[str, Callable[[], int]] = {
        name: functools.partial(decoded_tokens, translator, sources)
        for name, translator in translators.items()
    }
    train = {name: trainer(start, setup, mesh) for name, start in starts.items()}
    decoding, learning = rates(decode, setup.rounds), rates(train, setup.rounds)
    table = {}
    for (name, start), kind in itertools.product(starts.items(), setup.kv_caches):
        row = row_name(name, kind)
        scores, _ = evaluate_run(translators[row], pairs)
        table[row] = {
            "BLEU": scores.bleu,
            "BLEU, lower case": scores.bleu_lower_tokenized,
            "parameters": param_count(start.model),
            "bytes on disk": on_disk(Path(name)),
            "bytes in memory": sum(x.nbytes for x in jax.tree.leaves(start.params)),
            "bytes of the search": search_bytes(translators[row], sources),
            "tokens/s decoding": decoding[row],
            "tokens/s training": learning[name],
        }
    show(table)
    return table


def row_name(model: str, kind: str) -> str:
    return model if kind == "float" else f"{model}, {kind} cache"


def decoded_tokens(translator: Translator, sources: Sequence[str]) -> int:
    """Translates, and counts the tokens."""
    texts = [best[0].text for best in translator(sources)]
    return sum(map(len, translator.tokenizer.encode_target(texts)))


def trainer(start: Start, setup: Setup, mesh: jax.sharding.Mesh) -> Callable[[], int]:
    """A turn of training, on tokens that are drawn: their number is what it costs."""
    how = start.quantisation
    start = start.in_float()
    loss_fn = make_loss(
        start.model,
        0.1,
        start=start.tokenizer.start,
        eos=start.tokenizer.eos,
        quantise=how,
    )
    optimizer = training.make_optimizer(
        training.OptimizerConfig(peak_lr=1e-5, warmup_steps=1), steps=10**6
    )
    step = training.make_train_step(loss_fn, optimizer, mesh=mesh)
    state = training.create_state(start.params, optimizer, seed=0, mesh=mesh)
    shape = (2, setup.rows, setup.length)
    drawn = np.random.default_rng(0).integers(4, start.model.vocabulary, shape)
    source, target = drawn.astype(np.int32)
    batch = training.place_batch({"source": source, "target": target}, mesh)

    def turn() -> int:
        nonlocal state
        for _ in range(setup.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return setup.steps * setup.rows * setup.length

    return turn


def rates(turns: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a second of each, by turns; the first of each compiles and is not counted."""
    for turn in turns.values():
        turn()
    found: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds):
        for name in sorted(turns, key=list(turns).index, reverse=i % 2 == 1):
            began = time.perf_counter()
            tokens = turns[name]()
            found[name].append(tokens / (time.perf_counter() - began))
    return {name: statistics.median(x) for name, x in found.items()}


def on_disk(model: Path) -> int:
    """Bytes of a model's weights in files."""
    if is_compressed(model):
        return disk_bytes(model / WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        start = load_start(model)
        compress_model(model, Path(folder) / "out", start.quantisation)
        return disk_bytes(Path(folder) / "out" / WEIGHTS)


def search_bytes(translator: Translator, sources: Sequence[str]) -> int:
    """What the compiled search of a batch of these takes beside weights and sources."""
    encoded = data.encode_sources(list(sources), translator.tokenizer)
    rows = min(translator.decoding.batch_rows, len(sources))
    batches = data.source_batches(encoded, translator.lengths, rows=rows)
    _, source = max(batches, key=lambda batch: batch[1].size)
    placed = training.place_batch({"source": source}, translator.mesh)
    with jax.set_mesh(translator.mesh):
        lowered = search.search.lower(
            translator.params,
            placed["source"],
            *[None] * 4,
            graphs=translator.graphs,
            ids=translator.ids,
            decoding=translator.decoding,
            banned=(),
            longest=translator.decoding.max_length,
        )
    memory = lowered.compile().memory_analysis()
    if memory is None:  # A backend that does not say.
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def show(table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    printed = Table("model", *columns)
    for name, row in table.items():
        shown = [
            f"{int(x):,}" if column in NUMBERS or "tokens" in column else f"{x:.2f}"
            for column, x in row.items()
        ]
        printed.add_row(name, *shown)
    Console(width=200).print(printed)


if __name__ == "__main__":
    main(tyro.cli(Setup))
