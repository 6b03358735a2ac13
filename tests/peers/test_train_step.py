"""Both sides of `benchmarks.train_step` train, and they train the same model."""

import pytest

pytest.importorskip("torch")

import jax
from flax import nnx

from benchmarks.train_step import Setup, batches, marian, ours_step, torch_step
from qkv_jax.models import seq2seq

pytestmark = pytest.mark.peers

SETUP = Setup(
    d_model=16,
    d_ff=24,
    heads=2,
    layers=1,
    vocabulary=37,
    batch=8,
    length=5,
    dropout=0.0,
    learning_rate=3e-3,
)


@pytest.mark.parametrize("make_step", [torch_step, ours_step])
def test_a_side_learns_a_batch(make_step):
    step, batch = make_step(SETUP), batches(SETUP)[0]
    losses = [step(batch) for _ in range(60)]
    assert losses[0] > 3.0  # log 37 = 3.6
    assert losses[-1] < 0.7 * losses[0]


def test_both_sides_have_as_many_parameters():
    theirs = sum(p.numel() for p in marian(SETUP).parameters() if p.requires_grad)
    config = seq2seq.Config(
        vocabulary=37, d_model=16, d_ff=24, heads=2, encoder_layers=1, decoder_layers=1
    )
    params = nnx.state(seq2seq.Model(config, rngs=nnx.Rngs(0)), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == theirs
