import dataclasses
import json
from pathlib import Path

import pytest

from qkv_jax.data import Filters, HomeAssistantData, HubData, ParallelData
from qkv_jax.layers import AttentionKind
from qkv_jax.models import seq2seq
from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    precision,
)
from qkv_jax.translation import (
    DecodingConfig,
    TextConfig,
    TranslationConfig,
)


def make_config(**changes):
    """A configuration in which few fields have their defaults."""
    fields = {
        "data": HomeAssistantData(target="fr"),
        "text": TextConfig(
            vocabulary=77,
            tokenizer="bpe",
            filters=Filters(max_ratio=2.5, max_words=9),
            overlong="truncate",
        ),
        "model": seq2seq.small(kv_heads=2, norm="pre", embedding_dropout=0.2),
        "label_smoothing": 0.0,
        "optimizer": OptimizerConfig(name="adamw", weight_decay=0.1, clip_norm=1.0),
        "training": TrainingConfig(
            steps=7, metric="bleu", mode="max", patience=3, ema_decay=0.9
        ),
        "mesh": MeshConfig(data=2),
        "validation_sentences": 5,
        "decoding": DecodingConfig(beams=3, length_penalty="gnmt", alpha=0.6),
        "precision": precision.float16(),
        "run": RunConfig(directory=Path("runs/one")),
    }
    return TranslationConfig(**(fields | changes))


@pytest.mark.parametrize(
    "data",
    [
        ParallelData(directory=Path("some/where"), train=("a.en", "a.de"), valid=()),
        HomeAssistantData(source="de", target="pt-BR"),
        HubData(name="owner/name", config="de-en", test=None),
        HubData(name="owner/name"),
    ],
    ids=lambda data: type(data).__name__,
)
def test_json_brings_back_all_but_where_the_run_lies(data):
    config = make_config(data=data)
    content = json.loads(json.dumps(config.to_json()))
    there = TranslationConfig.from_json(content)
    assert there == dataclasses.replace(config, run=RunConfig(), mesh=MeshConfig())


@pytest.mark.parametrize(
    "change",
    [
        {"data": HomeAssistantData(target="nl")},
        {"text": TextConfig(vocabulary=78)},
        {"model": seq2seq.tiny()},
        {"label_smoothing": 0.2},
        {"precision": precision.bf16()},
        {"validation_sentences": 6},
        {"decoding": DecodingConfig()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_json_differs_where_a_field_does(change):
    assert make_config().to_json() != make_config(**change).to_json()


def test_packing_is_refused_where_pairs_cannot_be_kept_apart():
    linear = seq2seq.tiny(encoder_attention=AttentionKind(name="linear"))
    make_config(model=linear)
    with pytest.raises(ValueError, match="and that is not linear: set text.packing"):
        make_config(model=linear, text=TextConfig(packing=True))
    window = seq2seq.tiny(encoder_attention=AttentionKind(name="window"))
    make_config(model=window, text=TextConfig(packing=True))


def test_precision_says_what_the_model_computes_in():
    assert make_config().computed_model == seq2seq.small(
        kv_heads=2, norm="pre", embedding_dropout=0.2, dtype="float16"
    )


def test_a_runs_directory_is_no_part_of_its_json():
    assert make_config().to_json() == make_config(run=RunConfig()).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"validation_sentences": 0}, "metric 'bleu' needs validation_sentences"),
        (
            {"training": TrainingConfig(steps=7, metric="blue")},
            "metric must be one of loss, nll, correct, bleu; got 'blue'",
        ),
        (
            {"training": TrainingConfig(steps=7, metric="bleu")},
            "mode must be 'max' for the metric 'bleu'; got 'min'",
        ),
        (
            {"optimizer": OptimizerConfig(schedule="linear", warmup_steps=7)},
            "warmup_steps must be less than the 7 steps",
        ),
        (
            {
                "model": seq2seq.tiny(dtype="bfloat16"),
                "precision": precision.float32(),
            },
            "precision.compute is 'float32', and model.dtype is 'bfloat16'",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextConfig(vocabulary=0), "vocabulary must be positive; got 0"),
        (lambda: TextConfig(buckets=-1), "buckets must be positive; got -1"),
        (
            lambda: TextConfig(sampling=0.0),
            "sampling must be positive, or None; got 0.0",
        ),
        (
            lambda: TextConfig(sampling=1.0, tokenizer="bpe"),
            r"sampling must be in \(0, 1\) for 'bpe', or None; got 1.0",
        ),
        (lambda: TextConfig(sampling_nbest=5), "sampling_nbest is of sampling with"),
        (lambda: TextConfig(keep_references=True), "keep_references needs text.dist"),
        (
            lambda: TextConfig(sampling=0.1, sampling_nbest=1),
            "sampling_nbest must be 2 to 512, or -1; got 1",
        ),
        (lambda: DecodingConfig(beams=0), "beams must be positive; got 0"),
        (lambda: DecodingConfig(alpha=float("nan")), "alpha must be finite; got nan"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_mesh_may_resume_a_run():
    assert make_config().to_json() == make_config(mesh=MeshConfig(fsdp=2)).to_json()
