"""What does a model lose as heads, feed-forward units and weights go, and what does it gain?

    python -m benchmarks.pruning runs/demo --steps 150

Each kind of pruning is measured at several shares: BLEU on the run's test part right after, and
after `steps` further updates. Beside them stands the untouched model, trained on just as long: what
more training gives is no merit of pruning. Heads go by importance (Michel et al. 2019), or are
closed by learned gates (Voita et al. 2019), whose `steps` updates are the training of the gates;
weights go by size, at once and over three quarters of `steps` updates (Zhu and Gupta 2017).
Speed is measured in turns: each round times every model, and a ratio is the median over rounds of
the untouched model's time over a model's.

Everything lies in `folder`, numbers.json too; what is there is not made again.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure

from benchmarks.efficiency import Setup as Efficiency
from benchmarks.efficiency import decoded_tokens, trainer
from qkv_jax import training
from qkv_jax.compression import GateConfig, Pruning
from qkv_jax.data import cache_directory
from qkv_jax.training import RunConfig, SparsityConfig, is_finished, train_task
from qkv_jax.training.sparsity import next_masks
from qkv_jax.translation import Translator, evaluate_run, read_run
from qkv_jax.translation.compress import kept_heads, prune_model
from qkv_jax.translation.draw import draw_kept
from qkv_jax.translation.models import param_count
from qkv_jax.translation.run import read_result
from qkv_jax.translation.start import Start, load_start

Numbers = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured.

    Attributes:
        run: a trained run.
        folder: of the models that are made, of numbers.json, pruning.png and heads.png.
        heads, units: shares that are removed.
        penalties: of learned gates.
        zeros: shares of weights that become 0.
        steps: updates of each fine-tuning; 0: none more than numbers.json has already.
        peak_lr: of these.
        rounds: turns of each model, for its speed; 0: it is not measured.
        decoded: sentences of a turn.
    """

    run: tyro.conf.Positional[Path]
    folder: Path = Path("runs/pruning")
    heads: tuple[float, ...] = (0.25, 0.5, 0.75)
    units: tuple[float, ...] = (0.25, 0.5, 0.75)
    penalties: tuple[float, ...] = (0.02, 0.06)
    zeros: tuple[float, ...] = (0.5, 0.8)
    steps: int = 150
    peak_lr: float = 5e-4
    rounds: int = 5
    decoded: int = 128


def main(setup: Setup) -> Numbers:
    """Measures, draws and returns the numbers."""
    training.keep_programs(cache_directory() / "programs")
    setup.folder.mkdir(parents=True, exist_ok=True)
    whole = load_start(setup.run)
    lab = Lab(setup, whole)
    lab.scored("whole", whole, kind="whole")
    lab.tuned("control", setup.run, kind="control")
    for share in sorted(setup.heads, key=lambda x: abs(x - 0.5)):
        lab.pruned("heads", share, Pruning(heads=share))
    for penalty in setup.penalties:
        lab.gated(penalty)
    for share in setup.units:
        lab.pruned("units", share, Pruning(feed_forward=share))
    for share in setup.zeros:
        lab.sparse(share)
    if setup.rounds:
        lab.timed()
    draw(lab.numbers, setup.folder / "pruning.png")
    draw_kept(
        *kept_heads(setup.folder / f"heads-{nearest_half(setup.heads)}"),
        setup.folder / "heads.png",
    )
    return lab.numbers


class Lab:
    """Makes models of one, and keeps what is found of each."""

    def __init__(self, setup: Setup, whole: Start):
        self.setup, self.whole = setup, whole
        self.config = read_run(setup.run)
        self.pairs = self.config.data.load().test
        self.file = setup.folder / "numbers.json"
        self.numbers: Numbers = {}
        if self.file.exists():
            self.numbers = json.loads(self.file.read_text(encoding="utf-8"))

    def note(self, name: str, **found: Any) -> None:
        self.numbers[name] = self.numbers.get(name, {}) | found
        text = json.dumps(self.numbers, indent=1)
        self.file.write_text(text + "\n", encoding="utf-8")
        print(time.strftime("%X"), name, self.numbers[name], flush=True)

    def scored(self, name: str, start: Start, **about: Any) -> None:
        """BLEU of a model as it is."""
        if name in self.numbers:
            return
        translator = translator_of(start)
        scores, _ = evaluate_run(translator, self.pairs)
        self.note(name, bleu=scores.bleu, **self.sizes(start), **about)

    def sizes(self, start: Start) -> dict[str, float]:
        config: Any = start.model
        of = self.whole.model
        heads = [sum(head_counts(x)) for x in (config, of)]
        return {
            "parameters": param_count(config),
            "heads left": heads[0] / heads[1],
            "units left": config.d_ff / of.d_ff,  # type: ignore[union-attr]
        }

    def tuned(
        self,
        name: str,
        model: Path,
        *,
        kind: str,
        about: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        """BLEU of a model that is trained on."""
        directory, steps = self.setup.folder / name, self.setup.steps
        if name in self.numbers or not steps:
            return
        config = dataclasses.replace(
            self.config,
            init_from=str(model),
            optimizer=dataclasses.replace(
                self.config.optimizer,
                peak_lr=self.setup.peak_lr,
                warmup_steps=max(1, steps // 15),
            ),
            training=dataclasses.replace(
                self.config.training,
                steps=steps,
                evaluate_every=steps,
                checkpoint_every=steps,
            ),
            run=RunConfig(directory=directory),
            **changes,
        )
        if not is_finished(directory):
            train_task(config)
        result = read_result(directory) or {}
        found = self.sizes(load_start(directory)) | (about or {})
        self.note(name, bleu=result["test"]["bleu"], kind=kind, **found)

    def pruned(self, kind: str, share: float, what: Pruning) -> None:
        name = f"{kind}-{share}"
        out = self.setup.folder / name
        if not out.exists():
            prune_model(self.setup.run, out, what)
        self.scored(name, load_start(out), kind=kind)
        self.tuned(f"{name}-tuned", out, kind=f"{kind}, tuned")

    def gated(self, penalty: float) -> None:
        """Gates are trained, and the heads that they close removed."""
        name = f"gates-{penalty}"
        if not self.setup.steps:
            return
        # So fast that a logit may move by 20 in these few updates.
        speed = 40.0 / (self.setup.steps * self.setup.peak_lr)
        gates = GateConfig(penalty=penalty, speed=speed)
        self.tuned(f"{name}-training", self.setup.run, kind="gates' run", gates=gates)
        out = self.setup.folder / name
        try:
            if not out.exists():
                prune_model(
                    self.setup.folder / f"{name}-training", out, Pruning(gates=True)
                )
        except training.RunError as error:
            print(error, flush=True)
            return
        self.scored(name, load_start(out), kind="gates")

    def sparse(self, share: float) -> None:
        """The smallest weights are 0: at once, and by schedule."""
        name, steps = f"zeros-{share}", self.setup.steps
        left = {"weights left": 1 - share}
        once = SparsityConfig(final=share, end=1, every=1)
        if name not in self.numbers:
            masks = training.new_masks(self.whole.params, once)
            masks = jax.jit(lambda m, p: next_masks(m, p, jnp.asarray(1), once))(
                masks, self.whole.params
            )
            params = training.apply_masks(self.whole.params, masks)
            start = self.whole._replace(params=params)
            self.scored(name, start, kind="zeros", **left)
        end = max(1, steps * 3 // 4)
        every = max(n for n in range(1, min(10, end) + 1) if end % n == 0)
        how = SparsityConfig(final=share, end=end, every=every)
        kind = "zeros, tuned"
        self.tuned(f"{name}-tuned", self.setup.run, kind=kind, about=left, sparsity=how)

    def timed(self) -> None:
        """Speed beside the untouched model, in decoding and in training."""
        names = [n for n, x in self.numbers.items() if x["kind"] in TIMED]
        starts = {
            "whole": self.whole,
            **{name: load_start(self.setup.folder / name) for name in names},
        }
        sources = [source for source, _ in self.pairs[: self.setup.decoded]]
        mesh = training.make_mesh()
        how = Efficiency(run=self.setup.run, steps=4)
        decoding: dict[str, Callable[[], Any]] = {
            name: functools.partial(decoded_tokens, translator_of(start), sources)
            for name, start in starts.items()
        }
        learning: dict[str, Callable[[], Any]] = {
            name: trainer(start, how, mesh) for name, start in starts.items()
        }
        for what, turns in (("decoding", decoding), ("training", learning)):
            for name, ratio in speed_ratios(turns, self.setup.rounds).items():
                self.note(name, **{f"speed in {what}": ratio})


TIMED = ("heads, tuned", "gates", "units, tuned", "zeros, tuned")


def speed_ratios(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """How many times as fast as the first each is; the first turn of each compiles."""
    for turn in turns.values():
        turn()
    first, *others = turns
    found: dict[str, list[float]] = {name: [] for name in others}
    for i in range(rounds):
        seconds = {}
        for name in sorted(turns, key=list(turns).index, reverse=i % 2 == 1):
            began = time.perf_counter()
            turns[name]()
            seconds[name] = time.perf_counter() - began
        for name in others:
            found[name].append(seconds[first] / seconds[name])
    return {name: statistics.median(x) for name, x in found.items()}


def translator_of(start: Start) -> Translator:
    return Translator(
        start.model, start.params, start.tokenizer, decoding=start.decoding
    )


def head_counts(config: Any) -> list[int]:
    return [config.heads_of(name)[0] for name in config.attention_names]


def nearest_half(shares: Sequence[float]) -> float:
    return min(shares, key=lambda x: abs(x - 0.5))


# Of a panel: what is left, and the kinds of its two lines.
PANELS = {
    "attention heads left": ("heads left", "heads"),
    "feed-forward units left": ("units left", "units"),
    "weights of matrices left": ("weights left", "zeros"),
}


def draw(numbers: Numbers, path: Path) -> Figure:
    """Draws BLEU against what is left, before and after further training."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    whole, control = (numbers[name]["bleu"] for name in ("whole", "control"))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (title, (left, kind)) in zip(panels, PANELS.items()):
        axes.axhline(whole, color="0.6", ls=":", label="untouched")
        axes.axhline(control, color="0.3", ls="--", label="untouched, trained on")
        for of, all_left, colour, label in (
            (kind, whole, "#d1495b", "right after pruning"),
            (f"{kind}, tuned", control, "#2e6f95", "trained on"),
        ):
            found = [x for x in numbers.values() if x["kind"] == of]
            if not found:
                continue
            points = [(x[left], x["bleu"]) for x in found]
            points = sorted([*points, (1.0, all_left)])
            axes.plot(*zip(*points), "o-", color=colour, label=label)
        gates = [x for x in numbers.values() if x["kind"] == "gates"]
        if kind == "heads" and gates:
            points = [(x["heads left"], x["bleu"]) for x in gates]
            axes.plot(*zip(*points), "D", color="#66a182", label="closed by gates")
        axes.set_xlabel(title)
        axes.set_xlim(0, 1.03)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("BLEU, held-out")
    figure.savefig(path, dpi=150)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Setup))
