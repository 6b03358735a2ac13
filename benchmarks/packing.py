"""How many real target tokens a second does training see, with buckets and with packed rows?

    python -m benchmarks.packing --directory ../shared/data/multi30k

The experiment's own text, tokeniser, model and optimizer, on one device. Both kinds of batches
take turns in one process, each with a state of its own; the batches come from the iterator that
training has, so that making them counts. Every shape is compiled before the first turn, and the
time of that is told apart. Real tokens: padding does not count.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from qkv_jax import training
from qkv_jax.cli.parsing import load_experiment
from qkv_jax.data import train_iterator
from qkv_jax.translation import TranslationConfig
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from qkv_jax.translation.run import prepare

MULTI30K = Path("experiments/translation/multi30k.py")


@dataclasses.dataclass
class Side:
    """One kind of batches, and what is trained on them.

    Attributes:
        update: the compiled step.
        state: of its training.
        batches: without an end.
        compiling: seconds until every shape was compiled.
        padding: share of the target that is none.
        shapes: how many there are.
    """

    update: Any
    state: Any
    batches: Iterator
    compiling: float
    padding: float
    shapes: int

    @classmethod
    def of(cls, config: TranslationConfig, mesh: Any) -> "Side":
        prepared = prepare(config)
        tokenizer, stream = prepared.tokenizer, prepared.stream
        model = dataclasses.replace(config.model, vocabulary=tokenizer.target_size)
        optimizer = training.make_optimizer(config.optimizer, config.training.steps)
        update = training.make_train_step(
            make_loss(model, config.label_smoothing), optimizer, mesh=mesh
        )
        state = training.create_state(
            lambda: init_params(model, seed=0), optimizer, seed=0, mesh=mesh
        )
        began, seen = time.perf_counter(), set()
        for at in range(stream.batches(0)):
            batch = stream.batch(0, at)
            if batch["target"].shape + batch["source"].shape in seen:
                continue
            seen.add(batch["target"].shape + batch["source"].shape)
            state, metrics = update(state, training.place_batch(batch, mesh))
            jax.block_until_ready(metrics)
        compiling = time.perf_counter() - began
        report = stream.report()
        return cls(
            update,
            state,
            train_iterator(stream),
            compiling,
            report.target_padding,
            report.shapes,
        )

    def turn(self, steps: int, mesh: Any) -> tuple[float, float]:
        """Real target tokens a second, and an update."""
        began, tokens = time.perf_counter(), []
        for rows in itertools.islice(self.batches, steps):
            self.state, metrics = self.update(
                self.state, training.place_batch(rows, mesh)
            )
            tokens.append(metrics["tokens"])
            # As the loop has it: one step is in flight.
            jax.block_until_ready(tokens[-2:][0])
        count = float(sum(jax.device_get(tokens)))
        return count / (time.perf_counter() - began), count / steps


def main(
    *,
    experiment: Path = MULTI30K,
    directory: Path | None = None,
    rounds: int = 7,
    steps: int = 40,
    buckets: int = 8,
) -> None:
    """Real target tokens a second.

    Args:
        experiment: file whose CONFIG is of translation.
        directory: of its parallel text; None: as it says.
        rounds: turns of each.
        steps: updates of a turn.
        buckets: shapes of the batches that are not packed.
    """
    config = load_experiment(experiment)
    if directory is not None:
        data = dataclasses.replace(config.data, directory=directory)
        config = dataclasses.replace(config, data=data)
    mesh = training.make_mesh(training.MeshConfig(data=1), devices=jax.devices()[:1])
    sides = {}
    for name, packing in ((f"{buckets} buckets", False), ("packing", True)):
        changes: dict[str, Any] = {"packing": packing, "buckets": buckets}
        text = dataclasses.replace(config.text, **changes)
        sides[name] = Side.of(dataclasses.replace(config, text=text), mesh)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side.turn(steps, mesh))
    print(
        "| batches | tokens/s, median | best | worst | tokens an update | padding | shapes "
        f"| compiling, s |\n{'|---' * 8}|"
    )
    for name, side in sides.items():
        rates, updates = np.array(found[name]).T
        print(
            f"| {name} | {np.median(rates):,.0f} | {rates.max():,.0f} | {rates.min():,.0f} | "
            f"{updates.mean():,.0f} | {side.padding:.1%} | {side.shapes} | {side.compiling:.1f} |"
        )
    first, second = (np.array(turns)[:, 0] for turns in found.values())
    ratios = second / first
    print(
        f"packing / buckets: {np.median(ratios):.2f}x (turns {ratios.min():.2f} to "
        f"{ratios.max():.2f})"
    )


if __name__ == "__main__":
    tyro.cli(main)
