"""How fast is one train step, against the same model in `transformers` on torch?

    python -m benchmarks.train_step

Needs the extra `peers` (`make test-peers` sets up `.venv-peers` with it). Both sides train
the same encoder-decoder (MarianMTModel's architecture: post-norm, relu, sinusoidal positions,
one embedding table for source, target and output) in float32 on full batches: forward,
label-smoothed cross-entropy, backward, clipping by global norm, Adam.

Each side has a process of its own, so that neither's thread pool spins beside the other's,
and they take turns: a few steps of one, then of the other. The torch side is what a careful
plain training script would do: SDPA attention, fused Adam, `zero_grad(set_to_none=True)`, the
model in eager mode.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import tyro

Batch = dict[str, np.ndarray]
Step = Callable[[Batch], float]
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model, the batch and the step; the same for both sides."""

    d_model: int = 256
    d_ff: int = 1024
    heads: int = 4
    layers: int = 3
    """In the encoder, and again in the decoder."""
    vocabulary: int = 8_000
    batch: int = 64
    length: int = 32
    """Tokens of each source and of each target."""
    dropout: float = 0.1
    label_smoothing: float = 0.1
    learning_rate: float = 3e-4
    clip: float = 1.0
    cores: int = 2


def batches(setup: Setup, count: int = 8) -> list[Batch]:
    """Batches of random tokens, every row full: source and target (B, T) int32, EOS last."""
    rng = np.random.default_rng(0)
    shape = (2, setup.batch, setup.length)
    tokens = [
        rng.integers(4, setup.vocabulary, shape, dtype=np.int32) for _ in range(count)
    ]
    for pair in tokens:
        pair[:, :, -1] = EOS
    return [{"source": source, "target": target} for source, target in tokens]


def marian(setup: Setup):
    """The `transformers` model of the set-up, initialised at random."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=setup.vocabulary,
        d_model=setup.d_model,
        encoder_layers=setup.layers,
        decoder_layers=setup.layers,
        encoder_attention_heads=setup.heads,
        decoder_attention_heads=setup.heads,
        encoder_ffn_dim=setup.d_ff,
        decoder_ffn_dim=setup.d_ff,
        activation_function="relu",
        dropout=setup.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=setup.length,
        init_std=setup.d_model**-0.5,
        scale_embedding=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return MarianMTModel(config)


def torch_step(setup: Setup) -> Step:
    """batch -> loss a token, after one update of the `transformers` model."""
    import torch

    torch.set_num_threads(setup.cores)
    torch.manual_seed(0)
    model = marian(setup).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(
        parameters, lr=setup.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True
    )
    criterion = torch.nn.CrossEntropyLoss(
        ignore_index=PAD, label_smoothing=setup.label_smoothing
    )

    def step(batch: Batch) -> float:
        source = torch.from_numpy(batch["source"]).long()
        target = torch.from_numpy(batch["target"]).long()
        shifted = torch.nn.functional.pad(target[:, :-1], (1, 0), value=BOS)
        logits = model(
            input_ids=source,
            attention_mask=source != PAD,
            decoder_input_ids=shifted,
        ).logits
        loss = criterion(logits.flatten(0, 1), target.flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, setup.clip)
        adam.step()
        return loss.item()

    return step


def ours_step(setup: Setup) -> Step:
    """batch -> loss a token, after one update of our model."""
    from qkv_jax import training
    from qkv_jax.models import seq2seq
    from qkv_jax.translation.loss import make_loss
    from qkv_jax.translation.models import init_params

    config = seq2seq.Config(
        vocabulary=setup.vocabulary,
        d_model=setup.d_model,
        d_ff=setup.d_ff,
        heads=setup.heads,
        encoder_layers=setup.layers,
        decoder_layers=setup.layers,
        dropout=setup.dropout,
    )
    params = init_params(config, seed=0)
    loss_fn = make_loss(config, setup.label_smoothing)
    mesh = training.make_mesh(training.MeshConfig())
    optimizer = training.make_optimizer(
        training.OptimizerConfig(
            peak_lr=setup.learning_rate,
            warmup_steps=0,
            schedule="constant",
            clip_norm=setup.clip,
        ),
        steps=1,
    )
    update = training.make_train_step(loss_fn, optimizer, mesh=mesh)
    state = training.create_state(params, optimizer, seed=0, mesh=mesh)

    def step(batch: Batch) -> float:
        nonlocal state
        state, metrics = update(state, training.place_batch(batch, mesh))
        return float(metrics["loss"])

    return step


SIDES: dict[str, Callable[[Setup], Step]] = {"torch": torch_step, "ours": ours_step}


def serve(side: str, setup: Setup, connection: Connection) -> None:
    """Warms one side up, then answers each number of steps with their seconds; 0 ends it."""
    step, data = SIDES[side](setup), batches(setup)
    for batch in data:
        step(batch)
    connection.send(side)
    while steps := connection.recv():
        seconds = []
        for batch in (data * steps)[:steps]:
            start = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - start)
        connection.send(seconds)


@contextmanager
def started(side: str, setup: Setup) -> Iterator[Connection]:
    """The connection to a process of its own that is warmed up and waits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(side, setup, there), daemon=True)
    process.start()
    there.close()
    here.recv()
    yield here
    here.send(0)
    process.join()


def alternate(connections: list[Connection], rounds: int, steps: int) -> np.ndarray:
    """Seconds of each step, (sides, rounds, steps); one side runs while the others sleep."""
    seconds = []
    for _ in range(rounds):
        for connection in connections:
            connection.send(steps)
            seconds.append(connection.recv())
    return np.array(seconds).reshape(rounds, len(connections), steps).swapaxes(0, 1)


def report(sides: list[str], rates: np.ndarray) -> None:
    """Prints target tokens a second; rates: (sides, rounds, steps)."""
    versions = [f"{name} {version(name)}" for name in ("jax", "torch", "transformers")]
    print(", ".join(versions))
    print(f"{'target tokens/s':>18} {'median':>8} {'best':>8} {'worst':>8}")
    for name, rate in zip(sides, rates):
        print(
            f"{name:>18} {np.median(rate):8,.0f} {rate.max():8,.0f} {rate.min():8,.0f}"
        )
    if len(sides) == 2:
        torch, ours = np.median(rates, axis=2)
        turns = ours / torch
        ratio = np.median(rates[1]) / np.median(rates[0])
        print(
            f"ours / torch: {ratio:.2f}x (of medians; turns {turns.min():.2f} to {turns.max():.2f})"
        )


def main(
    setup: Setup,
    *,
    rounds: int = 12,
    steps: int = 5,
    side: Literal["both", "torch", "ours"] = "both",
) -> None:
    """Train-step speed, ours against transformers on torch.

    Args:
        setup: model, batch and step.
        rounds: turns of each side.
        steps: steps a turn.
        side: which side to run.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.cores])
        # A second busy process slows torch's spinning threads far more than XLA's.
        if os.getloadavg()[0] > 0.3:
            print(
                f"The machine is busy (load {os.getloadavg()[0]:.1f}): wait until it is idle."
            )
    sides: list[str] = ["torch", "ours"] if side == "both" else [side]
    with ExitStack() as stack:
        connections = [stack.enter_context(started(name, setup)) for name in sides]
        seconds = alternate(connections, rounds, steps)
    report(sides, setup.batch * setup.length / seconds)


if __name__ == "__main__":
    tyro.cli(main)
