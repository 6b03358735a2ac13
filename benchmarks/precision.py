"""What do precision policies, rematerialisation and scanned layers cost, and what do they change?

    python -m benchmarks.precision                       # memory, compile time, step time
    python -m benchmarks.precision --updates 150         # and the loss after 150 updates
    python -m benchmarks.precision --layers 6 --parts grid

The model, the batches and the optimizer are the demo's, on tokens that are drawn where only cost is
measured. Bytes are those of XLA's analysis of the compiled step: arguments (the state and a batch)
and temporaries. Compile time is lowering and compiling, each once. Steps of all rows of a table
take turns in one process, first to last and last to first, and the median of a row's turns is
printed. The loss is that of the demo's validation part after the same updates from the same
parameters; float32 is trained from several seeds, whose spread is what a policy's difference is to
be seen beside.
"""

import dataclasses
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from qkv_jax import training
from qkv_jax.models import seq2seq
from qkv_jax.training import PrecisionConfig, precision
from qkv_jax.translation import TranslationConfig
from qkv_jax.translation.demo import CONFIG
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params

Part = Literal["policies", "grid", "loss"]
POLICIES: dict[str, PrecisionConfig] = {
    "float32": precision.float32(),
    "mixed bf16": precision.mixed_bf16(),
    "bf16, nearest": precision.bf16("nearest"),
    "bf16, stochastic": precision.bf16(),
    "bf16, kahan": precision.bf16("kahan"),
    "float16": precision.float16(),
}
REMATS = ("none", "dots", "everything")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured.

    Attributes:
        parts: tables to make; "loss" needs updates.
        policies: of which; none: all.
        rows, length: of a drawn batch.
        layers: of each side; None: the demo's.
        vocabulary, batch_tokens: of a training; None: the demo's.
        rounds: turns of each row of a table.
        steps: of a turn.
        updates: of a training; 0: none.
        seeds: of the trainings in float32.
    """

    parts: tuple[Part, ...] = ("policies", "grid", "loss")
    policies: tuple[str, ...] = ()
    rows: int = 12
    length: int = 128
    layers: int | None = None
    vocabulary: int | None = None
    batch_tokens: int | None = None
    rounds: int = 5
    steps: int = 2
    updates: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        unknown = set(self.policies) - set(POLICIES)
        if unknown:
            raise ValueError(
                f"policies must be of {', '.join(POLICIES)}; got {unknown.pop()!r}."
            )

    @property
    def model(self) -> Any:
        """The demo's, of as many layers as are asked for."""
        demo: Any = CONFIG.model
        count = self.layers or demo.encoder_layers
        sizes: dict[str, Any] = {"encoder_layers": count, "decoder_layers": count}
        return dataclasses.replace(demo, **sizes)

    @property
    def chosen(self) -> dict[str, PrecisionConfig]:
        return {
            n: p for n, p in POLICIES.items() if not self.policies or n in self.policies
        }


def main(setup: Setup) -> dict[str, dict[str, dict[str, float]]]:
    """Measures, prints the tables, and returns them."""
    found = {}
    model: Any = dataclasses.replace(setup.model, vocabulary=CONFIG.text.vocabulary)
    if "policies" in setup.parts:
        rows = {name: (model, policy) for name, policy in setup.chosen.items()}
        found["policies"] = costs(rows, setup)
        show("policy", found["policies"])
    if "grid" in setup.parts:
        rows = {
            f"{remat}, {'scan' if scan else 'unrolled'}": (
                dataclasses.replace(model, remat=remat, scan_layers=scan),
                precision.DEFAULT,
            )
            for remat in REMATS
            for scan in (False, True)
        }
        found["grid"] = costs(rows, setup)
        show("remat, layers", found["grid"])
    if "loss" in setup.parts and setup.updates:
        found["loss"] = losses(setup)
        show("policy", found["loss"])
    return found


def costs(
    rows: dict[str, tuple[Any, PrecisionConfig]], setup: Setup
) -> dict[str, dict[str, float]]:
    """Memory and times of each row's step."""
    turns, table = {}, {}
    for name, (model, policy) in rows.items():
        turns[name], table[name] = compiled(model, policy, setup)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(setup.rounds):
        for name in list(rows)[:: 1 if i % 2 == 0 else -1]:
            began = time.perf_counter()
            turns[name]()
            times[name].append((time.perf_counter() - began) / setup.steps)
    for name, found in times.items():
        table[name]["step, s"] = statistics.median(found)
    return table


def compiled(
    model: Any, policy: PrecisionConfig, setup: Setup
) -> tuple[Callable[[], None], dict[str, float]]:
    """A turn of a model's step, and what the step took to compile and takes to hold."""
    model = training.apply_precision(model, policy)
    mesh = training.make_mesh()
    optimizer = training.make_optimizer(CONFIG.optimizer, CONFIG.training.steps)
    state = training.create_state(
        functools.partial(init_params, model, seed=0),
        optimizer,
        seed=0,
        mesh=mesh,
        precision=policy,
    )
    step: Any = training.make_train_step(
        make_loss(model, CONFIG.label_smoothing), optimizer, mesh=mesh, precision=policy
    )
    batch = training.place_batch(drawn(model, setup), mesh)
    began, worked = time.perf_counter(), time.process_time()
    run = step.lower(state, batch).compile()
    seconds, work = time.perf_counter() - began, time.process_time() - worked
    memory = run.memory_analysis()

    def turn() -> None:
        nonlocal state
        for _ in range(setup.steps):
            state, metrics = run(state, batch)
        jax.block_until_ready(metrics)

    turn()
    return turn, {
        "arguments, MB": memory.argument_size_in_bytes / 1e6,
        "temporaries, MB": memory.temp_size_in_bytes / 1e6,
        "compile, s": seconds,
        "of CPU, s": work,
    }


def drawn(model: seq2seq.Config, setup: Setup) -> dict[str, np.ndarray]:
    """Rows of two pairs each, as packing makes them."""
    rng = np.random.default_rng(0)
    shape = (2, setup.rows, setup.length)
    source, target = rng.integers(4, model.vocabulary, shape).astype(np.int32)
    pair = 1 + (np.arange(setup.length) >= setup.length // 2)
    pairs = np.broadcast_to(pair, source.shape).astype(np.int32)
    segments = {"source_segments": pairs, "target_segments": pairs}
    return {"source": source, "target": target} | segments


def losses(setup: Setup) -> dict[str, dict[str, float]]:
    """The validation loss of each policy at the first seed, and of float32 at the others too."""
    first, *more = setup.seeds
    runs = {name: (name, first) for name in setup.chosen}
    runs |= {f"float32, seed {seed}": ("float32", seed) for seed in more}
    table: dict[str, dict[str, float]] = {}
    for row, (name, seed) in runs.items():
        table[row] = trained(POLICIES[name], seed, setup)
        print(row, table[row], file=sys.stderr, flush=True)
    return table


def trained(policy: PrecisionConfig, seed: int, setup: Setup) -> dict[str, float]:
    """The validation loss of the demo after some updates."""
    updates = setup.updates
    once: dict[str, Any] = {
        name: updates for name in ("steps", "evaluate_every", "checkpoint_every")
    }
    config: TranslationConfig = dataclasses.replace(
        CONFIG,
        text=dataclasses.replace(
            CONFIG.text,
            vocabulary=setup.vocabulary or CONFIG.text.vocabulary,
            batch_tokens=setup.batch_tokens or CONFIG.text.batch_tokens,
        ),
        model=setup.model,
        precision=policy,
        optimizer=dataclasses.replace(
            CONFIG.optimizer, warmup_steps=max(1, updates // 10)
        ),
        training=dataclasses.replace(CONFIG.training, seed=seed, **once),
    )
    mesh = training.make_mesh()
    task = config.task(mesh)
    with tempfile.TemporaryDirectory() as directory:
        result = training.train(
            params=task.params,
            loss_fn=task.loss_fn,
            optimizer=config.optimizer,
            config=config.training,
            precision=policy,
            iterator=task.iterator,
            directory=directory,
            evaluate=task.evaluate,
            mesh=mesh,
            console=Console(file=io.StringIO()),
        )
    last = next(row for row in reversed(result.history) if "validation/loss" in row)
    return {"loss": last["validation/loss"], "nll": last["validation/nll"]}


def show(first: str, table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"| {' | '.join([first, *columns])} |\n{'|---' * (len(columns) + 1)}|")
    for name, row in table.items():
        print(
            f"| {name} | {' | '.join(f'{x:.4g}' for x in row.values())} |", flush=True
        )


if __name__ == "__main__":
    main(tyro.cli(Setup))
