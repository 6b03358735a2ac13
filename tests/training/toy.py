"""A model small enough to train in milliseconds: a bigram table behind a dropped-out embedding."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    make_mesh,
    train,
)

VOCAB, WIDTH = 11, 5


def params():
    rng = np.random.default_rng(7)
    arrays = {
        "embed": rng.normal(size=(VOCAB, WIDTH)),
        "head": {
            "kernel": rng.normal(size=(WIDTH, VOCAB)),
            "bias": rng.normal(size=VOCAB),
        },
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


def batch(seed, rows=16, length=7):
    """Rows of 1 to `length` tokens, then padding (0); the first row is padding only."""
    rng = np.random.default_rng(seed)
    source = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
    target = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = 0
    target[np.arange(length)[None] >= lengths[:, None]] = 0
    return {"source": source, "target": target}


def loss_fn(params, batch, rng):
    x = params["embed"][batch["source"]]
    if rng is not None:
        x = x * jax.random.bernoulli(rng, 0.9, x.shape) / 0.9
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None, None]
    logp = jax.nn.log_softmax(logits)
    labels = batch["target"]
    real = (labels > 0).astype(jnp.float32)
    nll = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    correct = (logits.argmax(-1) == labels).astype(jnp.float32)
    sums = {"loss_sum": nll, "nll_sum": nll, "correct": correct, "tokens": real}
    sums = {name: (value * real).sum() for name, value in sums.items()}
    return sums["loss_sum"], sums


def dry_loss_fn(params, batch, rng):
    """The same without dropout, for tests that compare gradients."""
    del rng
    return loss_fn(params, batch, None)


@dataclasses.dataclass
class Batches:
    """An endless stream, of two shapes in turn, whose position is a number."""

    position: int = 0

    def __next__(self):
        self.position += 1
        return batch(self.position, length=5 + self.position % 2)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def run(directory, *, steps=4, iterator=None, **options):
    """Trains the toy, quietly; options are those of train() and of TrainingConfig."""
    options.setdefault("mesh", make_mesh(MeshConfig(data=1)))  # compiles faster
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    config = {
        "checkpoint_every": 1,
        "evaluate_every": 1,
        "log_every": 1,
        "ema_decay": 0.9,
    }
    config |= {name: options.pop(name) for name in list(options) if name in names}
    optimizer = OptimizerConfig(peak_lr=0.05, warmup_steps=2, clip_norm=1.0)
    return train(
        params=options.pop("params", params()),
        loss_fn=options.pop("loss_fn", loss_fn),
        optimizer=options.pop("optimizer", optimizer),
        config=TrainingConfig(steps=steps, **config),
        iterator=Batches() if iterator is None else iterator,
        directory=directory,
        console=Console(file=io.StringIO()),
        **options,
    )


def arrays(state):
    """Every array of a state by name, as bytes can be compared."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(one, other):
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name
