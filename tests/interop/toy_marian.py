"""A model of the Marian toolkit with random numbers, as its trainer writes it."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.interop import toy

OPTIONS = {
    "bert-train-type-embeddings": "true",
    "bert-type-vocab-size": 2,
    "dec-cell": "gru",
    "dec-cell-base-depth": 2,
    "dec-cell-high-depth": 1,
    "dec-depth": 1,
    "dim-emb": 12,
    "dim-rnn": 1024,
    "enc-cell": "gru",
    "enc-cell-depth": 1,
    "enc-depth": 2,
    "enc-type": "bidirectional",
    "input-types": [],
    "layer-normalization": False,
    "lemma-dim-emb": 0,
    "right-left": False,
    "skip": False,
    "tied-embeddings": False,
    "tied-embeddings-all": True,
    "tied-embeddings-src": False,
    "transformer-aan-activation": "swish",
    "transformer-aan-depth": 2,
    "transformer-aan-nogate": False,
    "transformer-decoder-autoreg": "self-attention",
    "transformer-depth-scaling": True,
    "transformer-dim-aan": 2048,
    "transformer-dim-ffn": 20,
    "transformer-ffn-activation": "swish",
    "transformer-ffn-depth": 2,
    "transformer-guided-alignment-layer": "last",
    "transformer-heads": 3,
    "transformer-no-projection": False,
    "transformer-pool": False,
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-preprocess": "",
    "transformer-tied-layers": [],
    "transformer-train-position-embeddings": False,
    "type": "transformer",
    "ulr": False,
    "ulr-dim-emb": 0,
    "version": "v1.9.0 ba94c5b9 2020-05-17 10:42:17 +0100",
}


def options(vocabulary: int, **changed: Any) -> dict[str, Any]:
    found = OPTIONS | {"dim-vocabs": [vocabulary, vocabulary]}
    return found | {name.replace("_", "-"): value for name, value in changed.items()}


def arrays(rng: np.random.Generator, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as Marian names and shapes them: (in, out), vectors as (1, n)."""
    D, F, V = (
        options["dim-emb"],
        options["transformer-dim-ffn"],
        options["dim-vocabs"][0],
    )
    shapes: dict[str, tuple[int, int]] = {}
    for side, depth in (("encoder", "enc-depth"), ("decoder", "dec-depth")):
        for i in range(1, options[depth] + 1):
            for block in ("self", "context") if side == "decoder" else ("self",):
                stem = f"{side}_l{i}_{block}"
                shapes |= {f"{stem}_W{x}": (D, D) for x in "qkvo"}
                shapes |= {f"{stem}_b{x}": (1, D) for x in "qkvo"}
                shapes |= {f"{stem}_Wo_ln_{x}": (1, D) for x in ("scale", "bias")}
            stem = f"{side}_l{i}_ffn"
            shapes |= {f"{stem}_W1": (D, F), f"{stem}_b1": (1, F)}
            shapes |= {f"{stem}_W2": (F, D), f"{stem}_b2": (1, D)}
            shapes |= {f"{stem}_ffn_ln_{x}": (1, D) for x in ("scale", "bias")}
    if options["tied-embeddings-all"] or options["tied-embeddings-src"]:
        shapes["Wemb"] = (V, D)
    else:
        shapes |= {"encoder_Wemb": (V, D), "decoder_Wemb": (V, D)}
    if not (options["tied-embeddings-all"] or options["tied-embeddings"]):
        shapes["decoder_ff_logit_out_W"] = (D, V)
    shapes["decoder_ff_logit_out_b"] = (1, V)
    return {x: rng.normal(size=n).astype(np.float32) for x, n in shapes.items()}


def write(
    directory: Path, options: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    text = yaml.safe_dump(options).encode() + b"\0"
    content = arrays | {"special:model.yml": np.frombuffer(text, np.int8)}
    np.savez(directory / "model.npz", **content)


def vocabulary(directory: Path) -> int:
    """source.spm, target.spm, a vocabulary in YAML and decoder.yml; its size."""
    (directory / "source.spm").write_bytes(toy.train(toy.ENGLISH))
    (directory / "target.spm").write_bytes(toy.train(toy.GERMAN))
    found = {*toy.pieces(toy.train(toy.ENGLISH)), *toy.pieces(toy.train(toy.GERMAN))}
    names = ["</s>", "<unk>", "no", "1", '"']
    names += sorted(found - {*names, "<s>"})
    lines = [f"{quoted(x)}: {i}\n" for i, x in enumerate(names)]
    (directory / "opus.vocab.yml").write_text("".join(lines), encoding="utf-8")
    decoder = (
        "relative-paths: true\nmodels:\n  - model.npz\nvocabs:\n  - opus.vocab.yml\n"
    )
    decoder += "  - opus.vocab.yml\nbeam-size: 6\nnormalize: 1\n"
    (directory / "decoder.yml").write_text(decoder)
    return len(names)


def quoted(piece: str) -> str:
    return piece if piece.isalnum() else '"' + piece.replace('"', '\\"') + '"'
