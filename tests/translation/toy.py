"""A corpus of reversed number words, and runs on it that take seconds."""

import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import (
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    train_task,
)
from qkv_jax.translation import (
    DecodingConfig,
    TextConfig,
    TranslationConfig,
)

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PARTS = {"train": 150, "valid": 8, "test": 12}


def write_corpus(directory: Path) -> Path:
    """Files such as train.en and train.de, where each target is its source read backwards."""
    rng = random.Random(5)
    directory.mkdir(parents=True, exist_ok=True)
    for part, count in PARTS.items():
        lines = [rng.choices(WORDS, k=rng.randint(1, 7)) for _ in range(count)]
        for language, step in (("en", 1), ("de", -1)):
            text = "".join(" ".join(line[::step]) + "\n" for line in lines)
            (directory / f"{part}.{language}").write_text(text, encoding="utf-8")
    return directory


def shrink(
    config: TranslationConfig, *, corpus: Path, directory: Path, **training: Any
) -> TranslationConfig:
    """The configuration on the toy corpus, with a model that trains in milliseconds a step."""
    changes = {"evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "average": 1}
    model = {"d_model": 16, "d_ff": 32, "heads": 2, "kv_heads": None}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    sizes = {
        name: size
        for name, size in (model | layers).items()
        if hasattr(config.model, name)
    }
    text = {"vocabulary": 280, "batch_tokens": 512, "buckets": 1}
    return dataclasses.replace(
        config,
        data=ParallelData(directory=corpus),
        text=dataclasses.replace(config.text, **text, max_source=24, max_target=24),
        model=dataclasses.replace(config.model, **sizes),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        training=dataclasses.replace(config.training, **(changes | training)),
        decoding=dataclasses.replace(
            config.decoding, max_length=12, max_source=24, batch_rows=8
        ),
        run=RunConfig(directory=directory),
    )


def make_config(
    corpus: Path, directory: Path, *, steps: int = 4, **changes: Any
) -> TranslationConfig:
    """A run of 4 steps; changes are those of `TranslationConfig`."""
    config = TranslationConfig(
        data=ParallelData(directory=corpus),
        text=TextConfig(tokenizer="bpe"),
        model=seq2seq.tiny(dropout=0.1),
        optimizer=OptimizerConfig(peak_lr=1e-2),
        training=TrainingConfig(steps=steps, keep=2),
        decoding=DecodingConfig(beams=3),
    )
    config = shrink(config, corpus=corpus, directory=directory)
    return dataclasses.replace(config, **changes)


def run(config: TranslationConfig, *, draws: bool = False) -> dict[str, Any]:
    """Trains quietly; its pictures take longer than its steps, and few tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("qkv_jax.translation.draw.draw_run", lambda *_: None)
        return train_task(config, console=Console(file=io.StringIO()))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by its name there."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
