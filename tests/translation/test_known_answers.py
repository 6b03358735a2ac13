"""Digit strings to copy and to sort: the whole trainer on tasks whose answers are known."""

import math
import random

import pytest

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    Outcome,
    RunConfig,
    TrainingConfig,
    make_mesh,
    read_metrics,
)
from qkv_jax.translation import (
    DecodingConfig,
    TextConfig,
    TranslationConfig,
    load_run,
)
from tests.translation import toy

PARTS = {"train": 4000, "valid": 300, "test": 300}
ANSWERS = {"copy": list, "sort": sorted}


def write_strings(directory, answer, seed):
    """Strings of 3 to 8 digits; none stands in two parts, or twice in one."""
    rng, seen = random.Random(seed), set()
    for part, count in PARTS.items():
        strings = []
        while len(strings) < count:
            string = tuple(rng.choices("0123456789", k=rng.randint(3, 8)))
            if string not in seen:
                strings.append(string)
                seen.add(string)
        for language, lines in (("in", strings), ("out", map(answer, strings))):
            text = "".join(" ".join(line) + "\n" for line in lines)
            (directory / f"{part}.{language}").write_text(text)


def make_config(directory, seed):
    return TranslationConfig(
        data=ParallelData(directory=directory, source="in", target="out"),
        text=TextConfig(
            vocabulary=276, tokenizer="bpe", batch_tokens=640, packing=True
        ),
        model=seq2seq.Config(
            d_model=64,
            d_ff=128,
            heads=4,
            encoder_layers=1,
            decoder_layers=1,
            norm="pre",
            dropout=0.0,
        ),
        label_smoothing=0.0,
        optimizer=OptimizerConfig(
            name="muon", peak_lr=1.5e-2, warmup_steps=20, schedule="linear"
        ),
        training=TrainingConfig(steps=300, evaluate_every=300, seed=seed),
        mesh=MeshConfig(data=1),
        decoding=DecodingConfig(
            beams=1, max_source=16, max_length=16, batch_rows=PARTS["test"]
        ),
        run=RunConfig(directory=directory / "run"),
    )


@pytest.mark.parametrize(
    "task, perplexity, exact", [("copy", 1.02, 0.98), ("sort", 1.03, 0.97)]
)
def test_a_model_learns_what_can_be_known(
    task, perplexity, exact, tmp_path, monkeypatch
):
    """On strings it has not seen: teacher-forced, and by greedy search."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"{task}: seed {seed}")
    write_strings(tmp_path, ANSWERS[task], seed)
    config = make_config(tmp_path, seed)
    monkeypatch.setattr("qkv_jax.translation.run._finish", lambda *_: Outcome())
    toy.run(config)
    found = read_metrics(tmp_path / "run")[-1]
    translator = load_run(tmp_path / "run", mesh=make_mesh(config.mesh))
    pairs = config.data.load().test
    said = [best[0].text for best in translator([pair[0] for pair in pairs])]
    right = sum(text == pair[1] for text, pair in zip(said, pairs)) / len(pairs)
    reached = math.exp(found["validation/nll"])
    print(f"perplexity {reached:.4f}, exact match {right:.1%}")
    assert reached <= perplexity and right >= exact
