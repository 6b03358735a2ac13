"""Models of the Marian toolkit (model.npz, decoder.yml, vocabularies) as Hugging Face directories.

The names of tensors, and what of Marian's options the Hugging Face model can hold, follow
`convert_marian_to_pytorch.py` of `transformers`.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkv_jax.interop.directory import new_directory
from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.marian_vocabulary import read_yaml, vocabularies
from qkv_jax.interop.pretrained import write_json
from qkv_jax.interop.tensors import write_tensors

OPTIONS = "special:model.yml"
BIAS = "decoder_ff_logit_out_b"
OUTPUT = "decoder_ff_logit_out_W"
# Options that have to be so, where a file holds them: all else is another model.
FIXED: dict[str, Any] = {
    "type": "transformer",
    "layer-normalization": False,
    "right-left": False,
    "input-types": [],
    "lemma-dim-emb": 0,
    "factors-dim-emb": 0,
    "ulr": False,
    "ulr-dim-emb": 0,
    "output-omit-bias": False,
    "transformer-no-projection": False,
    "transformer-rnn-projection": False,
    "transformer-pool": False,
    "transformer-ffn-depth": 2,
    "transformer-decoder-ffn-depth": 0,
    "transformer-decoder-autoreg": "self-attention",
    "transformer-tied-layers": [],
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-train-position-embeddings": False,
    "transformer-train-positions": False,
    "train-embedder-rank": [],
    "special-vocab": [],
}
# Of other types, of training, or of book-keeping.
NEUTRAL = {
    "version",
    "skip",
    "best-deep",
    "dim-rnn",
    "enc-type",
    "enc-cell",
    "enc-cell-depth",
    "dec-cell",
    "dec-cell-base-depth",
    "dec-cell-high-depth",
    "factors-combine",
    "lemma-dependency",
    "transformer-dim-aan",
    "transformer-aan-depth",
    "transformer-aan-activation",
    "transformer-aan-nogate",
    "transformer-guided-alignment-layer",
    "transformer-depth-scaling",
    "ulr-trainable-transformation",
    "char-stride",
    "char-highway",
    "char-conv-filters-num",
    "char-conv-filters-widths",
    "bert-train-type-embeddings",
    "bert-type-vocab-size",
}
TIED = ("tied-embeddings", "tied-embeddings-src", "tied-embeddings-all")
SIZES = (
    "dim-emb",
    "enc-depth",
    "dec-depth",
    "transformer-heads",
    "transformer-dim-ffn",
)
READ = {*SIZES, *TIED, "dim-vocabs", "transformer-ffn-activation"}
READ |= {"transformer-decoder-dim-ffn"}
ACTIVATIONS = ("swish", "relu", "gelu")
MATRIX = re.compile(r"_W[qkvo12]$")
LETTERS = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))


def is_marian_npz(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a model of the Marian toolkit, and none of Hugging Face."""
    directory = Path(directory)
    return any(directory.glob("*.npz")) and not (directory / "config.json").exists()


def convert_marian(
    directory: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
    """Writes a model of the Marian toolkit as the directory that `load` and `load_tokenizer` read.

    Padding becomes the last id, with a row of zeros, as Hugging Face models have it.

    Args:
        directory: with one .npz, decoder.yml, and either vocabularies (.yml) with source.spm and
            target.spm, or vocabularies that are SentencePiece models (.spm).
        out: an empty or new directory.

    Raises:
        InteropError: a file is missing or damaged, `out` is not empty, or the model is none that
            the Hugging Face model can hold; all mismatches are in one message.
    """
    directory, out = Path(directory), Path(out)
    decoder = _decoder(directory)
    path = _model(directory, decoder)
    arrays = _arrays(path)
    options = _options(path, arrays)
    settings = _settings(path, options)
    tensors, problems = _tensors(settings, arrays)
    if problems:
        raise _unfit(path, problems)
    files, eos = vocabularies(directory, decoder, pad=settings["pad_token_id"])
    settings |= {"eos_token_id": eos, "forced_eos_token_id": eos}
    if isinstance(beams := decoder.get("beam-size"), str) and beams.isdigit():
        settings["num_beams"] = int(beams)
    with new_directory(out) as building:
        write_tensors(building, tensors)
        for name, content in (files | {"config.json": settings}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, building / name)
            else:
                write_json(building / name, content)


def names(layers: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(Marian's name, the Hugging Face name) of every tensor but tables and output.

    Args:
        layers: "encoder" and "decoder" -> number of layers.
    """
    for side, count in layers.items():
        blocks = [("self", "self_attn")]
        if side == "decoder":
            blocks.append(("context", "encoder_attn"))
        for i in range(count):
            stem, layer = f"{side}_l{i + 1}", f"model.{side}.layers.{i}"
            for ours, theirs in blocks:
                for letter, part in LETTERS:
                    yield f"{stem}_{ours}_W{letter}", f"{layer}.{theirs}.{part}.weight"
                    yield f"{stem}_{ours}_b{letter}", f"{layer}.{theirs}.{part}.bias"
                norm = f"{layer}.{theirs}_layer_norm"
                yield f"{stem}_{ours}_Wo_ln_scale", f"{norm}.weight"
                yield f"{stem}_{ours}_Wo_ln_bias", f"{norm}.bias"
            for number in (1, 2):
                yield f"{stem}_ffn_W{number}", f"{layer}.fc{number}.weight"
                yield f"{stem}_ffn_b{number}", f"{layer}.fc{number}.bias"
            yield f"{stem}_ffn_ffn_ln_scale", f"{layer}.final_layer_norm.weight"
            yield f"{stem}_ffn_ffn_ln_bias", f"{layer}.final_layer_norm.bias"


def _decoder(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InteropError(f"{directory} is no directory.")
    path = directory / "decoder.yml"
    return read_yaml(path, path.read_bytes()) if path.is_file() else {}


def _model(directory: Path, decoder: Mapping[str, Any]) -> Path:
    named = [Path(str(name)).name for name in decoder.get("models") or []]
    found = [directory / name for name in named if (directory / name).is_file()]
    found = found or sorted(directory.glob("*.npz"))
    if len(found) != 1:
        listed = ", ".join(x.name for x in found) or "none"
        raise InteropError(f"{directory} must hold one .npz; it holds {listed}.")
    return found[0]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InteropError(f"{path} is damaged ({error}): get it again.") from None


def _options(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if OPTIONS not in arrays:
        raise InteropError(f"{path} is no model of Marian: it lacks {OPTIONS}.")
    return read_yaml(path, arrays[OPTIONS].astype(np.uint8).tobytes().rstrip(b"\0"))


def _settings(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, and every option that it cannot hold."""
    plain = {name: _plain(value) for name, value in options.items()}
    problems = [
        f"option {name} must be {wanted!r}; it is {plain[name]!r}"
        for name, wanted in FIXED.items()
        if name in plain and plain[name] != wanted
    ]
    known = FIXED.keys() | NEUTRAL | READ
    problems += [f"option {name} is unknown" for name in sorted(plain.keys() - known)]
    problems += [
        f"option {name} must be a number; it is {plain.get(name)!r}"
        for name in SIZES
        if type(plain.get(name)) is not int
    ]
    vocabularies = plain.get("dim-vocabs")
    if not isinstance(vocabularies, list) or len(set(vocabularies)) != 1:
        problems.append(
            f"option dim-vocabs must be two equal sizes, as Hugging Face models have one id of "
            f"padding; it is {vocabularies!r}"
        )
    if plain.get("transformer-ffn-activation") not in ACTIVATIONS:
        problems.append(
            f"option transformer-ffn-activation must be one of {', '.join(ACTIVATIONS)}; it is "
            f"{plain.get('transformer-ffn-activation')!r}"
        )
    if "type" not in plain:
        problems.append("option type is missing")
    if problems:
        raise _unfit(path, problems)
    pad, everything = plain["dim-vocabs"][0], plain.get("tied-embeddings-all", False)
    width = plain["transformer-dim-ffn"]
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "vocab_size": pad + 1,
        "decoder_vocab_size": pad + 1,
        "share_encoder_decoder_embeddings": everything or plain.get(TIED[1], False),
        "tie_word_embeddings": everything or plain.get(TIED[0], False),
        "d_model": plain["dim-emb"],
        "encoder_layers": plain["enc-depth"],
        "decoder_layers": plain["dec-depth"],
        "encoder_attention_heads": plain["transformer-heads"],
        "decoder_attention_heads": plain["transformer-heads"],
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": plain.get("transformer-decoder-dim-ffn") or width,
        "activation_function": plain["transformer-ffn-activation"],
        "max_position_embeddings": max(512, plain["dim-emb"]),
        "scale_embedding": True,
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "is_encoder_decoder": True,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
        "bos_token_id": 0,
        "bad_words_ids": [[pad]],
        "max_length": 512,
        "init_std": 0.02,
        "use_cache": True,
    }


def _tensors(
    settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors under their new names, and what is missing, left, or of another type."""
    layers = {side: settings[f"{side}_layers"] for side in ("encoder", "decoder")}
    wanted = dict(names(layers)) | {BIAS: "final_logits_bias"}
    shared = settings["share_encoder_decoder_embeddings"]
    if shared:
        wanted["Wemb"] = "model.shared.weight"
    else:
        wanted["encoder_Wemb"] = "model.encoder.embed_tokens.weight"
        wanted["decoder_Wemb"] = "model.decoder.embed_tokens.weight"
    if not settings["tie_word_embeddings"]:
        wanted[OUTPUT] = "lm_head.weight"
    problems = [f"tensor {x} is missing" for x in sorted(wanted.keys() - arrays.keys())]
    left = arrays.keys() - wanted.keys() - {OPTIONS}
    problems += [f"tensor {name} is not used" for name in sorted(left)]
    problems += [
        f"tensor {name} must be float32 of two axes; it is {x.dtype} {x.shape}"
        for name, x in arrays.items()
        if name in wanted and (x.dtype not in (np.float32, np.float16) or x.ndim != 2)
    ]
    if problems:
        return {}, problems
    tensors = {there: _place(name, arrays[name]) for name, there in wanted.items()}
    return tensors, []


def _place(name: str, x: np.ndarray) -> np.ndarray:
    """Marian multiplies rows by matrices, (in, out), and has vectors as rows, (1, n)."""
    x = x.astype(np.float32)
    if name.endswith("Wemb"):
        return np.pad(x, ((0, 1), (0, 0)))
    if name == BIAS:
        return np.pad(x, ((0, 0), (0, 1)))
    if name == OUTPUT:
        return np.pad(x.T, ((0, 1), (0, 0)))
    return x.T if MATRIX.search(name) else x.reshape(-1)


def _plain(value: Any) -> Any:
    """What a scalar of YAML means; it was read as text."""
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if value in ("true", "false"):
        return value == "true"
    return int(value) if isinstance(value, str) and value.isdigit() else value


def _unfit(path: Path, problems: list[str]) -> InteropError:
    return InteropError(f"{path} is no model that can be taken: {'; '.join(problems)}.")
