"""What a training step's memory becomes where a model's layers are a loop and computed again.

    python -m benchmarks.layer_memory
    python -m benchmarks.layer_memory --models speech items

Bytes are those of XLA's analysis of the compiled loss and gradient, on drawn batches: temporaries,
beside parameters, gradients and the batch. Nothing is run. benchmarks/precision.py has the same of
translation, with the optimizer and times.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from qkv_jax.models import image_text, recommender, speech, text_classifier, vit

WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "loop, dots": {"scan_layers": True, "remat": "dots"},
    "loop, everything": {"scan_layers": True, "remat": "everything"},
}
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured.

    Attributes:
        models: of "text", "images", "items", "speech", "captions"; none: all.
    """

    models: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(
                f"models must be of {', '.join(MODELS)}; got {unknown.pop()!r}."
            )


def text() -> tuple[Any, Any, dict[str, np.ndarray]]:
    config = text_classifier.Config(
        classes=2, vocabulary=8000, layers=4, d_ff=512, window=64
    )
    return (
        text_classifier,
        config,
        {"tokens": _ids(8000, 8, 1024, 1), "labels": _ids(2, 8)},
    )


def images() -> tuple[Any, Any, dict[str, np.ndarray]]:
    config = vit.Config(height=28, width=28, channels=1, classes=10, layers=6)
    pixels = RNG.integers(0, 256, (128, 28, 28, 1)).astype(np.uint8)
    return vit, config, {"image": pixels, "label": _ids(10, 128)}


def items() -> tuple[Any, Any, dict[str, np.ndarray]]:
    config = recommender.sasrec(items=2414, longest=200, layers=4)
    rows = _ids(2414, 64, 200) + 1
    return recommender, config, {"items": rows, "segments": np.ones_like(rows)}


def speech_() -> tuple[Any, Any, dict[str, np.ndarray]]:
    config = speech.Config(vocabulary=30, channels=13)
    features = RNG.normal(size=(16, 600, 13)).astype(np.float32)
    lengths = np.full(16, 600, np.int32)
    tokens = _ids(26, 16, 40) + 4
    return speech, config, {"features": features, "lengths": lengths, "tokens": tokens}


def captions() -> tuple[Any, Any, dict[str, np.ndarray]]:
    config = image_text.Config(
        vocabulary=2000, longest=16, image_layers=4, text_layers=4, caption_layers=4
    )
    pictures = RNG.integers(0, 256, (32, 2, 64, 64, 3)).astype(np.uint8)
    return image_text, config, {"image": pictures, "tokens": _ids(1990, 32, 3, 16) + 4}


Made = Callable[[], tuple[Any, Any, dict[str, np.ndarray]]]
MODELS: dict[str, Made] = {
    "text": text,
    "images": images,
    "items": items,
    "speech": speech_,
    "captions": captions,
}


def main(setup: Setup) -> dict[str, dict[str, float]]:
    """Measures, prints the table, and returns it, in MB."""
    print(f"| MB | {' | '.join(WAYS)} |\n{'|---' * (len(WAYS) + 1)}|", flush=True)
    table = {}
    for name in setup.models or MODELS:
        module, config, batch = MODELS[name]()
        rows = len(next(iter(batch.values())))
        batch = batch | {"weight": np.ones(rows, np.float32)}
        table[name] = {
            way: temporaries(module, dataclasses.replace(config, **changes), batch)
            for way, changes in WAYS.items()
        }
        cells = " | ".join(f"{x:.4g}" for x in table[name].values())
        print(f"| {name} | {cells} |", flush=True)
    return table


def temporaries(module: Any, config: Any, batch: dict[str, np.ndarray]) -> float:
    """MB that the loss and gradient of a model take beside what they are given and give."""
    graph, params = nnx.split(
        nnx.eval_shape(lambda: module.Model(config, rngs=nnx.Rngs(0)))
    )

    def loss(params: Any, batch: Any) -> Any:
        return nnx.merge(graph, params).loss(batch, rng=jax.random.key(1))[0]

    program = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes / 1e6


def _ids(size: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, size, shape).astype(np.int32)


if __name__ == "__main__":
    main(tyro.cli(Setup))
