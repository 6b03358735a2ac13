"""Runs whose heads close and whose weights become 0."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.cli import main
from qkv_jax.compression import GateConfig, Pruning, Quantisation
from qkv_jax.layers import AttentionKind
from qkv_jax.models import recurrent, seq2seq
from qkv_jax.training import (
    FinetuneConfig,
    LoraConfig,
    RunError,
    SparsityConfig,
    TrainingConfig,
    flatten,
)
from qkv_jax.translation import load_translator
from qkv_jax.translation.compress import compress_model, kept_heads, prune_model
from qkv_jax.translation.draw import draw_kept
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import gated_params
from qkv_jax.translation.start import load_start
from qkv_jax.translation.tickets import begun
from tests.translation import toy

PAIRS = [("one two three", "three two one"), ("nine", "nine")]
# Closes heads within an update or two.
CLOSING = GateConfig(penalty=30.0, start=1.0, speed=200.0)
SPARSE = SparsityConfig(final=0.75, end=2, every=2)


def scores(directory):
    return [x.score for x in load_translator(directory).score(PAIRS)]


def kernels(directory, **options):
    params = flatten(load_start(directory, **options).params)
    return {n: np.asarray(x) for n, x in params.items() if "kernel" in n}


def test_heads_that_training_closes_are_removed_without_a_difference(
    finished, corpus, tmp_path
):
    config = toy.make_config(
        corpus, tmp_path / "gated", steps=3, init_from=str(finished), gates=CLOSING
    )
    toy.run(dataclasses.replace(config, validation_sentences=2))
    whole = load_start(tmp_path / "gated")
    assert whole.model == load_start(finished).model
    pruned = prune_model(tmp_path / "gated", tmp_path / "out", Pruning(gates=True))
    assert pruned.model.heads == 1 and whole.model.heads == 2
    np.testing.assert_allclose(
        scores(tmp_path / "out"), scores(tmp_path / "gated"), atol=1e-5
    )
    measure, heads = kept_heads(tmp_path / "out")
    assert "norm" in measure and list(heads) == pruned.model.attention_names
    for found in heads.values():
        assert len(found["kept"]) == 1 and 0.0 in found["values"]
    with pytest.raises(RunError, match="none of the 6 heads is closed"):
        prune_model(finished, tmp_path / "no", Pruning(gates=True))
    assert not (tmp_path / "no").exists()


def test_open_gates_cost_loss_in_training_alone(finished):
    start = load_start(finished)
    batch = {"source": jnp.array([[5, 2]]), "target": jnp.array([[7, 2]])}

    def sums(penalty, rng):
        how = GateConfig(penalty=penalty)
        params = gated_params(start.model, start.params, how)
        return jax.jit(make_loss(start.model, 0.1, gates=how))(params, batch, rng)[1]

    free, dear = (sums(x, jax.random.key(0)) for x in (0.0, 0.5))
    # Six heads, each open with probability sigmoid(2 + 2/3 ln 11); two tokens.
    expected = 6 / (1 + np.exp(-2 - 2 / 3 * np.log(11)))
    assert free["gates_sum"] == pytest.approx(2 * expected, rel=1e-5)
    assert dear["loss_sum"] - free["loss_sum"] == pytest.approx(expected, rel=1e-4)
    free, dear = (sums(x, None) for x in (0.0, 0.5))
    assert free["loss_sum"] == dear["loss_sum"] and free["gates_sum"] == 12


@pytest.fixture(scope="module")
def sparse(finished, corpus, tmp_path_factory):
    """A run that becomes sparse after two updates of five, all of whose checkpoints stay."""
    directory = tmp_path_factory.mktemp("sparse") / "run"
    config = toy.make_config(
        corpus, directory, init_from=str(finished), sparsity=SPARSE
    )
    training = TrainingConfig(steps=5, keep=9, checkpoint_every=1, evaluate_every=9)
    toy.run(dataclasses.replace(config, training=training))
    return directory


def test_a_sparse_run_is_used_as_it_ended(sparse, tmp_path):
    for name, x in kernels(sparse).items():
        assert (x == 0).sum() == round(0.75 * x.size), name
    assert not (np.asarray(load_start(sparse, checkpoint=2).params) == 0).any()
    compress_model(sparse, tmp_path / "int8", Quantisation(weights="int8"))
    found = load_start(tmp_path / "int8").in_float()
    for name, x in flatten(found.params).items():
        if "kernel" in name:
            assert (np.asarray(x) == 0).mean() >= 0.75


@pytest.mark.parametrize("step", [0, 2])
def test_a_ticket_has_early_weights_and_the_last_mask(
    finished, sparse, corpus, tmp_path, step
):
    config = toy.make_config(
        corpus,
        tmp_path / "ticket",
        steps=1,
        init_from=str(sparse),
        sparsity=SparsityConfig(rewind=step),
    )
    start, _ = begun(config)
    early = kernels(sparse, checkpoint=step) if step else kernels(finished)
    last, begins = kernels(sparse), flatten(start.params)
    for name, x in early.items():
        np.testing.assert_array_equal(begins[name], np.where(last[name] == 0, 0, x))
    if step:
        toy.run(config)
        for name, x in kernels(tmp_path / "ticket").items():
            np.testing.assert_array_equal(x == 0, last[name] == 0)


def test_a_ticket_that_cannot_be_is_refused(finished, sparse, corpus, tmp_path):
    def run(model, step):
        how = SparsityConfig(rewind=step)
        directory = tmp_path / "no"
        toy.run(toy.make_config(corpus, directory, init_from=str(model), sparsity=how))

    with pytest.raises(RunError, match="kept no checkpoint of step 77, only of 1, 2"):
        run(sparse, 77)
    with pytest.raises(RunError, match="train it with --sparsity.final first"):
        run(finished, 2)
    assert not (tmp_path / "no").exists()


def test_patterns_are_refused_before_anything_is_written(finished, corpus, tmp_path):
    how = dataclasses.replace(SPARSE, parameters=("*.kernl",))
    config = toy.make_config(
        corpus, tmp_path / "no", init_from=str(finished), sparsity=how
    )
    with pytest.raises(RunError, match="sparsity: parameters has the pattern"):
        toy.run(config)
    assert not (tmp_path / "no").exists()


def with_training(**changes):
    return {"training": TrainingConfig(steps=9, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": recurrent.Config(d_model=16)}, "the recurrent model has none"),
        ({"quantise": Quantisation(weights="int8")}, "scales that quantise rounds"),
        (
            {"finetune": FinetuneConfig(lora=LoraConfig(rank=2))},
            "lora trains adapters alone",
        ),
        (with_training(patience=2), "training.patience must be None with gates"),
        (
            {"gates": GateConfig(), "sparsity": SparsityConfig(rewind=2)},
            "name it by init_from",
        ),
        (
            {"gates": GateConfig(), "sparsity": SparsityConfig(final=0.5, end=50)},
            "sparsity.end must be less than training.steps",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.make_config(tmp_path, tmp_path, **({"gates": CLOSING} | changes))


def test_gates_are_refused_where_heads_cannot_go(corpus, tmp_path):
    window = AttentionKind(name="window")
    sizes = {"d_model": 16, "d_ff": 32, "heads": 2}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1}
    models = {
        "relative positions": seq2seq.Config(positions="relative", **sizes),
        "window": seq2seq.Config(encoder_attention=window, **sizes),
    }
    for message, model in models.items():
        config = toy.make_config(corpus, tmp_path / "no", model=model, gates=CLOSING)
        with pytest.raises(RunError, match=message):
            toy.run(config)
    assert not (tmp_path / "no").exists()


def test_heads_that_stayed_are_drawn(tmp_path, capsys):
    heads = {"encoder.0.attention": {"values": [0.1, 0.9], "kept": [1]}}
    content = {"measure": "importance", "heads": heads}
    (tmp_path / "pruned.json").write_text(json.dumps(content), "utf-8")
    figure = draw_kept(*kept_heads(tmp_path), tmp_path / "again.png")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0.10", "0.90\nkept"]
    assert main(["plot", str(tmp_path), "--what", "kept"]) == 0
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "no"), "--what", "kept"]) == 2
    assert "name a directory that `qkv-jax prune` wrote" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
