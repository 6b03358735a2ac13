"""The demo: a translator of user-interface text, trained from nothing in a few minutes."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qkv_jax.data import HomeAssistantData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig, train_task
from qkv_jax.translation.config import DecodingConfig, TextConfig, TranslationConfig
from qkv_jax.translation.run import load_run

CONFIG = TranslationConfig(
    data=HomeAssistantData(),
    text=TextConfig(
        vocabulary=8000, batch_tokens=1536, packing=True, max_source=112, max_target=128
    ),
    model=seq2seq.Config(
        d_model=192,
        d_ff=512,
        heads=4,
        encoder_layers=2,
        decoder_layers=2,
        norm="pre",
        dropout=0.05,
    ),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=6e-3,
        warmup_steps=100,
        schedule="linear",
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=1600, evaluate_every=800, checkpoint_every=800, keep=2, log_every=25
    ),
    decoding=DecodingConfig(beams=6, batch_rows=128),
)
SHOWN = 10


def run_demo(
    config: TranslationConfig, *, console: Console, program: str = "qkv-jax"
) -> dict[str, Any]:
    """Trains, evaluates, translates ten held-out sentences, draws, and prints a table.

    Args:
        config: of the run; its corpus has a test part.
        console: for the table; progress goes to standard error.
        program: how the user calls the command line.

    Returns:
        What result.json holds.
    """
    began = time.perf_counter()
    result = train_task(config)
    directory = config.run.directory or Path()
    translator = load_run(directory)
    pairs = config.data.load().test[:SHOWN]
    sources = [source for source, _ in pairs]
    samples = Table("source", "translation", "reference", title="held-out sentences")
    for (source, reference), found in zip(pairs, translator(sources)):
        samples.add_row(source, found[0].text, reference)
    console.print(samples, markup=False)
    seconds = time.perf_counter() - began
    summary = _summary(result, directory, seconds, program)
    console.print(summary, markup=False)
    return result


def _summary(
    result: dict[str, Any], directory: Path, seconds: float, program: str
) -> Table:
    test, table = result["test"], Table(title="held-out test set", show_header=False)
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF")):
        table.add_row(label, f"{test[name]:.1f}   {test['signatures'][name]}")
    table.add_row(
        "speed",
        f"{result['steady_tokens_per_second']:,.0f} target tokens/s in training",
    )
    table.add_row("time", f"{seconds / 60:.1f} min")
    table.add_row("run", f"{directory}   (model_card.md, curves.png, attention.png)")
    table.add_row("try it", f'{program} translate {directory} "Turn on the light"')
    return table
