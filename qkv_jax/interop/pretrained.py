"""Published translation models as ours, and back, tensor by tensor."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.families import FAMILIES, Family, Keys
from qkv_jax.interop.names import KINDS, Place, places, table_names, unused
from qkv_jax.interop.tensors import read_tensors, write_tensors
from qkv_jax.layers import init_rngs
from qkv_jax.models.seq2seq import Config, Model
from qkv_jax.ops import sinusoids

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# What float32 formulas differ by, over the first 1,024 positions.
SINUSOID_TOLERANCE = 1e-4
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with its weights, and all it takes to write it back.

    Attributes:
        family: `model_type` of its configuration.
        config: of `seq2seq.Model`.
        params: its `nnx.Param` state, float32.
        start: id that every target starts from; None: its language, which the tokeniser knows.
        eos: id that ends a target.
        first: id that every target has to begin with; None: any.
        settings: its config.json.
        generation: its generation_config.json; {} where it has none.
        places: where each tensor came from, token tables included.
        dtypes: of the tensors.
        kept: tensors that are computed anew or never read, as they were.
    """

    family: str
    config: Config
    params: Any
    start: int | None
    eos: int
    first: int | None
    settings: dict[str, Any]
    generation: dict[str, Any]
    places: tuple[Place, ...]
    dtypes: dict[str, np.dtype]
    kept: dict[str, np.ndarray]

    def model(self) -> Model:
        """The module with these weights."""
        graph = nnx.split(abstract_model(self.config), nnx.Param)[0]
        return nnx.merge(graph, self.params)


def load(directory: str | os.PathLike, *, ignore: Collection[str] = ()) -> Pretrained:
    """The model of a Hugging Face directory: Marian, M2M100, NLLB, BART, mBART, T5, mT5, Flan.

    Args:
        directory: with config.json and model.safetensors (or pytorch_model.bin, read without
            unpickling; whole or in shards).
        ignore: keys of config.json that are known not to change what is computed.

    Raises:
        InteropError: a file is missing or damaged; or anything of the configuration or the
            tensors is missing, unknown, or of another shape. All of it is in one message.
    """
    directory = Path(directory)
    settings = _read_json(directory / CONFIG_FILE)
    generation = {}
    if (directory / GENERATION_FILE).is_file():
        generation = _read_json(directory / GENERATION_FILE)
    fields, special = read_fields(settings, generation, directory, ignore=ignore)
    tensors = read_tensors(directory)
    return assemble(fields, special, settings, generation, tensors, directory)


def read_fields(
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    directory: Path,
    *,
    ignore: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of our Config but vocabulary and tie, and the ids of decoding.

    Args:
        settings, generation: of the two JSON files.
        directory: they are said to be of, in errors.
        ignore: see `load`.

    Raises:
        InteropError: see `load`.
    """
    name = settings.get("model_type")
    if name not in FAMILIES:
        raise InteropError(
            f"{directory / CONFIG_FILE} is of model_type {name!r}; known are "
            f"{', '.join(FAMILIES)}."
        )
    family, keys = FAMILIES[name], Keys(settings)
    special = _special(keys, generation, family)
    fields = family.fields(keys)
    problems = keys.finish(ignore)
    if problems:
        raise _mismatch(directory, problems)
    return fields, special


def save(pretrained: Pretrained, directory: str | os.PathLike) -> None:
    """Writes config.json, generation_config.json and model.safetensors, as `transformers` reads.

    Tensors have the names, shapes and dtypes that the model was loaded with.

    Raises:
        InteropError: the directory holds files already.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise InteropError(f"{directory} is not empty: choose another directory.")
    named = flatten(pretrained.params)
    tensors = dict(pretrained.kept)
    for ours, theirs, kind in pretrained.places:
        x = KINDS[kind].save(np.asarray(named[ours]))
        tensors[theirs] = x.astype(pretrained.dtypes[theirs])
    write_tensors(directory, tensors)
    write_json(directory / CONFIG_FILE, pretrained.settings)
    if pretrained.generation:
        write_json(directory / GENERATION_FILE, pretrained.generation)


def _special(
    keys: Keys, generation: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """Ids of decoding, from the generation settings where they stand there."""

    def find(name: str) -> Any:
        keys.read.add(name)
        value = generation.get(name)
        return keys.content.get(name) if value is None else value

    start, eos = find("decoder_start_token_id"), find("eos_token_id")
    if (
        start is None and family.t5
    ):  # Implied by the family: targets start from padding.
        start = find("pad_token_id")
    for name, value in (("decoder_start_token_id", start), ("eos_token_id", eos)):
        start_implied = start is None and family.starts_from_language
        implied = start_implied and name == "decoder_start_token_id"
        if type(value) is not int and not implied:
            keys.problems.append(f"config key {name!r} must be an id; it is {value!r}")
    return {"start": start, "eos": eos, "first": find("forced_bos_token_id")}


def _tables(
    family: Family,
    tensors: Mapping[str, np.ndarray],
    directory: Path,
    *,
    tied: Mapping[str, Any],
) -> tuple[dict[str, tuple[str, np.ndarray]], Any]:
    """Our tables with the tensors they come from, and which are one: those with equal bits."""
    candidates = table_names(family)
    if not tied.get("tie_word_embeddings", True):
        candidates["output"] = ["lm_head.weight"]
    found = {}
    for role, names in candidates.items():
        there = [name for name in names if name in tensors]
        if not there:
            problem = f"tensor {' or '.join(names)} is missing: the {role} embedding"
            raise _mismatch(directory, [problem])
        found[role] = (there[0], tensors[there[0]])
    source, target, output = (found[role] for role in ("source", "target", "output"))
    for role, (name, x) in found.items():
        if x.ndim != 2:
            raise _mismatch(
                directory, [f"tensor {name} must be (V, D); it is {x.shape}"]
            )
    inputs, outputs = _same(source[1], target[1]), _same(target[1], output[1])
    tables = {"target_embedding": target}
    if not inputs:
        tables["source_embedding"] = source
    if not outputs:
        tables["output"] = output
    tie = {(1, 1): "all", (0, 1): "target", (1, 0): "input", (0, 0): "none"}
    return tables, tie[int(inputs), int(outputs)]


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays have the same bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left is right or left.tobytes() == right.tobytes()


def _source_vocabulary(tables: Mapping[str, tuple[str, np.ndarray]], tie: str):
    if tie not in ("target", "none"):
        return None
    count = len(tables["source_embedding"][1])
    return None if count == len(tables["target_embedding"][1]) else count


def assemble(
    fields: Mapping[str, Any],
    special: Mapping[str, Any],
    settings: dict[str, Any],
    generation: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    directory: Path,
) -> Pretrained:
    """The model of the tensors of a checkpoint.

    Args:
        fields, special: of `read_fields`.
        settings, generation: of the two JSON files.
        tensors: by their names there.
        directory: they are said to be of, in errors.

    Raises:
        InteropError: see `load`.
    """
    name = settings["model_type"]
    family = FAMILIES[name]
    if not any(theirs.startswith(family.prefix) for theirs in tensors):
        # Of the model without its output, as facebook/bart-large: neither prefix nor bias.
        family = dataclasses.replace(family, prefix="")
        fields = {**fields, "output_bias": "final_logits_bias" in tensors}
    tables, tie = _tables(family, tensors, directory, tied=settings)
    try:
        config = Config(
            **fields,
            tie=tie,
            vocabulary=len(tables["target_embedding"][1]),
            source_vocabulary=_source_vocabulary(tables, tie),
        )
    except (ValueError, TypeError) as error:
        raise InteropError(f"{directory / CONFIG_FILE}: {error}") from error
    where = [
        Place(f"{ours}.table", there, "same") for ours, (there, _) in tables.items()
    ]
    where += places(family, config)
    shapes = flatten(nnx.state(abstract_model(config), nnx.Param))
    problems, arrays = [], {}
    for ours, theirs, kind in where:
        if theirs not in tensors:
            problems.append(f"tensor {theirs} is missing")
            continue
        wanted, found = _theirs(shapes[ours], kind), tensors[theirs]
        if found.shape != wanted:
            problems.append(f"tensor {theirs} must be {wanted}; it is {found.shape}")
            continue
        x = KINDS[kind].load(np.asarray(found), shapes[ours].shape)
        arrays[ours] = jnp.asarray(x.astype(np.float32))
    used = {place.theirs for place in where}
    aliases, wrong = _aliases(family, tables, tensors, used)
    kept, odd = _kept(family, config, tensors)
    problems += wrong + odd
    left = tensors.keys() - used - {place.theirs for place in aliases} - kept.keys()
    problems += [f"tensor {name} is not used" for name in sorted(left)]
    if not problems and config.zero_pad:
        problems += _nonzero_pad(config, arrays)
    if problems:
        raise _mismatch(directory, problems)
    state = nnx.state(abstract_model(config), nnx.Param)
    structure = jax.tree.structure(state)
    return Pretrained(
        family=name,
        config=config,
        params=jax.tree.unflatten(structure, [arrays[ours] for ours in shapes]),
        settings=settings,
        generation=generation,
        places=(*where, *aliases),
        dtypes={theirs: x.dtype for theirs, x in tensors.items()},
        kept=kept,
        **special,
    )


def _aliases(
    family: Family,
    tables: Mapping[str, tuple[str, np.ndarray]],
    tensors: Mapping[str, np.ndarray],
    used: Collection[str],
) -> tuple[list[Place], list[str]]:
    """Further names of the token tables, each with the bits of one of them; and those without."""
    names = {name for group in table_names(family).values() for name in group}
    aliases, problems = [], []
    for name in sorted(names & tensors.keys() - set(used)):
        twins = [ours for ours, (_, x) in tables.items() if _same(x, tensors[name])]
        if twins:
            aliases.append(Place(f"{twins[0]}.table", name, "same"))
        else:
            problems.append(f"tensor {name} differs from every table that is used")
    return aliases, problems


def _kept(
    family: Family, config: Config, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors that are computed anew or never read, and those that are not what they should be."""
    kept = {name: tensors[name] for name in unused(family) if name in tensors}
    problems = []
    for name, x in kept.items():
        if "embed_positions" not in name:
            continue
        if x.ndim != 2 or x.shape[1] != config.d_model:
            problems.append(f"tensor {name} is no table of positions: it is {x.shape}")
            continue
        rows = jnp.arange(min(len(x), 1024))
        inclusive = config.positions == "sinusoid_inclusive"
        wanted = np.array(sinusoids(rows, config.d_model, inclusive=inclusive))
        if inclusive:  # The row of padding.
            wanted[config.pad] = 0.0
        error = np.abs(x[: len(rows)].astype(np.float32) - wanted).max()
        limit = SINUSOID_TOLERANCE if x.dtype == np.float32 else 1e-2
        if error > limit:
            problems.append(f"tensor {name} holds other positions (by {error:.1g})")
    return kept, problems


def _nonzero_pad(config: Config, arrays: Mapping[str, jax.Array]) -> list[str]:
    """A row that is held at 0 must be 0: else what it was would be lost."""
    return [
        f"row {config.pad} of {name}, the padding, must be 0"
        for name, x in arrays.items()
        if name.endswith("embedding.table")
        and config.pad < len(x)
        and bool(jnp.any(x[config.pad] != 0))
    ]


def _theirs(like: Any, kind: str) -> tuple[int, ...]:
    return KINDS[kind].save(np.broadcast_to(np.float32(0), like.shape)).shape


def abstract_model(config: Config) -> Model:
    """The module with shapes in place of parameters."""
    return nnx.eval_shape(lambda: Model(config, rngs=init_rngs(0)))


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter state by dotted name: "encoder.0.attention.query.kernel", ..."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
    ]
    return {name.removesuffix(".value"): x for name, (_, x) in zip(names, leaves)}


def _mismatch(directory: Path, problems: list[str]) -> InteropError:
    more = len(problems) - SHOWN
    text = "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return InteropError(f"{directory} does not fit: {text}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise InteropError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path} must hold a JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
