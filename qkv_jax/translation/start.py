"""What a run, or a translator, starts from: a published model, another run, or nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax import data, training
from qkv_jax.compression import Quantisation, dequantised, pack, unpack
from qkv_jax.data import (
    MultilingualData,
    SentenceTokenizer,
    Tokenizer,
    language_tag,
    write_atomically,
)
from qkv_jax.interop import (
    InteropError,
    Pretrained,
    fetch,
    is_marian_npz,
    load,
    load_description,
    load_tokenizer,
    save_description,
)
from qkv_jax.models import seq2seq
from qkv_jax.training import Checkpoint
from qkv_jax.translation.config import (
    DecodingConfig,
    LanguageConfig,
    TranslationConfig,
)
from qkv_jax.translation.models import (
    FLOAT,
    ModelConfig,
    folded_params,
    model_shapes,
    quantised_params,
)
from qkv_jax.translation.translator import Translator

TOKENIZER = "tokenizer"
MODEL = "model.json"
COMPRESSED = "compressed.json"
WEIGHTS = "weights"
NO_LANGUAGES = LanguageConfig()
# What a run may choose anew for a model that it starts from: none changes what weights mean.
FREE = (
    "dropout",
    "embedding_dropout",
    "attention_dropout",
    "activation_dropout",
    "dtype",
    "output_dtype",
    "remat",
    "scan_layers",
    "context",
)
# Our names of decoding for those of a generation_config.json.
GENERATION = {
    "num_beams": "beams",
    "length_penalty": "alpha",
    "max_length": "max_length",
    "min_length": "min_length",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "repetition_penalty": "repetition_penalty",
}


class Start(NamedTuple):
    """A model with its weights.

    Attributes:
        model: its configuration.
        params: its weights.
        tokenizer: that it was trained with.
        decoding: how it is made to translate.
        pretrained: where it is a published one, what it takes to write it back.
        quantisation: of the weights.
    """

    model: ModelConfig
    params: Any
    tokenizer: SentenceTokenizer
    decoding: DecodingConfig
    pretrained: Pretrained | None
    quantisation: Quantisation = FLOAT

    def in_float(self) -> "Start":
        """The same model with float32 weights."""
        if self.quantisation == FLOAT:
            return self
        # Integers have lost the names of their axes.
        like = jax.tree.structure(model_shapes(self.model))
        params = jax.tree.unflatten(like, jax.tree.leaves(dequantised(self.params)))
        pretrained = self.pretrained
        if pretrained is not None:
            pretrained = dataclasses.replace(pretrained, params=params)
        return self._replace(params=params, pretrained=pretrained, quantisation=FLOAT)


def load_translator(
    model: str | Path,
    *more: str | Path,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
    n_best: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    **decoding: Any,
) -> Translator:
    """A model ready to translate: of a run, of a Hugging Face directory, or of a hub name.

    Args:
        model: directory of a run, imported or published model, or a name such as
            "Helsinki-NLP/opus-mt-en-de".
        *more: models that decide with it, by the mean of their log-probabilities.
        checkpoint: of runs; see `load_run`.
        languages: of models for several.
        n_best: translations of each sentence that will be asked for: where `decoding` does not
            say otherwise, at least so many beams are kept.
        mesh: see `Translator`.
        **decoding: fields of `DecodingConfig` to change; None: as configured.

    Raises:
        RunError, InteropError: there is no such model, or it is damaged or does not fit.
    """
    options: dict[str, Any] = {"checkpoint": checkpoint, "languages": languages}
    others = [load_translator(one, mesh=mesh, **options, **decoding) for one in more]
    start = load_start(model, **options)
    changes = {name: value for name, value in decoding.items() if value is not None}
    try:
        configured = dataclasses.replace(start.decoding, **changes)
        if "beams" not in changes:
            beams = max(n_best, configured.beams)
            configured = dataclasses.replace(configured, beams=beams)
        return Translator(
            start.model,
            start.params,
            start.tokenizer,
            decoding=configured,
            mesh=mesh,
            others=others,
            quantisation=start.quantisation,
        )
    except ValueError as error:
        raise training.RunError(f"{model}: {error}") from error


def load_start(
    model: str | Path,
    *,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """A run's, an imported, a published or a compressed model; arguments as for `load_translator`."""
    if is_compressed(model):
        if checkpoint is not None:
            raise training.RunError(
                f"{model} is a compressed model, made of one checkpoint: leave out that option."
            )
        return _of_compressed(Path(model), languages)
    if is_run(model):
        return _of_run(Path(model), checkpoint, languages)
    if is_marian_npz(model):
        raise training.RunError(
            f"{model} holds a model of the Marian toolkit: make it one of ours first, "
            f"qkv-jax import {model} OUT."
        )
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise training.RunError(
            f"{model} is not a run or a published model: it has no config.json."
        )
    if checkpoint is not None:
        raise training.RunError(
            f"{model} is no run: it has no checkpoints to choose from."
        )
    directory = fetch(str(model))
    pretrained = load(directory)
    tokenizer = published_tokenizer(directory, pretrained, languages)
    return Start(
        pretrained.config,
        pretrained.params,
        tokenizer,
        published_decoding(pretrained),
        pretrained,
    )


def is_run(directory: str | Path) -> bool:
    """Whether a directory is that of a run, by its config.json."""
    return training.run_kind(directory) is not None


def is_compressed(directory: str | Path) -> bool:
    """Whether a directory is one that `compress_model` or `prune_model` made."""
    return (Path(directory) / COMPRESSED).is_file()


def read_run(directory: str | Path) -> TranslationConfig:
    """The configuration of a run on disk.

    Raises:
        RunError: it is no run of this task.
    """
    content = training.read_config(directory)
    for name in ("tokenizer", "batch_rows", "teacher"):
        content.pop(name, None)
    try:
        return TranslationConfig.from_json(content)
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise training.RunError(
            f"{directory} is not a run of this version's translation task ({error}): "
            "use the version that made it."
        ) from error


def published_tokenizer(
    directory: Path, pretrained: Pretrained, languages: LanguageConfig
) -> SentenceTokenizer:
    """The tokeniser of a published model, of which every id has its row of the embeddings.

    Raises:
        InteropError: a file is missing, or the vocabularies do not fit.
    """
    tokenizer = load_tokenizer(
        directory,
        family=pretrained.family,
        settings=pretrained.settings,
        generation=pretrained.generation,
        source_language=languages.source,
        target_language=languages.target,
        source_prefix=languages.prefix,
    )
    config = pretrained.config
    for side, ids, rows in (
        ("source", tokenizer.source_size, config.source_vocabulary),
        ("target", tokenizer.target_size, config.vocabulary),
    ):
        rows = config.vocabulary if rows is None else rows
        if ids > rows:
            raise InteropError(
                f"{directory}: the tokeniser has {ids:,} ids on the {side} side, and the model "
                f"{rows:,} embeddings: they are of different models."
            )
    return tokenizer


def published_decoding(pretrained: Pretrained) -> DecodingConfig:
    """How a published model is configured to translate; what it does not say, as ours is."""
    settings = pretrained.settings | pretrained.generation
    found = {
        ours: settings[theirs]
        for theirs, ours in GENERATION.items()
        if settings.get(theirs) is not None
    }
    if settings.get("early_stopping") == "never":
        found["exact"] = True
    # Their lengths count the start; ours do not.
    if "max_length" in found:
        found["max_length"] = max(1, found["max_length"] - 1)
    found["min_length"] = max(0, found.get("min_length", 0) - 2)
    return DecodingConfig(**found)


def started(config: TranslationConfig) -> Start | None:
    """What a run starts from, with what it may choose anew; None: from new weights.

    Raises:
        RunError, InteropError: as `load_start`.
    """
    if config.init_from is None:
        return None
    start = load_start(config.init_from, languages=config.languages).in_float()
    if type(config.model) is not type(start.model):
        raise training.RunError(
            f"{config.init_from} is another kind of model than the experiment's: start from one "
            "of the same kind"
        )
    chosen = config.computed_model
    free = {f.name for f in dataclasses.fields(chosen)} & set(FREE)
    changes: dict[str, Any] = {name: getattr(chosen, name) for name in free}
    return start._replace(model=dataclasses.replace(start.model, **changes))


def check_prunable(config: ModelConfig, model: str | Path, *, heads: bool) -> None:
    """Raises RunError where layers, or heads one by one, of a model cannot be removed."""
    if not isinstance(config, seq2seq.Config):
        return
    kinds = {config.encoder_attention.name, config.decoder_attention.name}
    if kinds != {seq2seq.Config().encoder_attention.name}:
        raise training.RunError(
            f"{model} has self-attention of the kinds {', '.join(sorted(kinds))}, whose own "
            "parameters belong to heads and places of layers: only plain attention is pruned."
        )
    if heads and config.positions == "relative":
        raise training.RunError(
            f"{model} has relative positions, whose biases all layers of a side share, a column a "
            "head: prune feed_forward or layers."
        )


def run_model(
    config: TranslationConfig, tokenizer: SentenceTokenizer, directory: Path
) -> ModelConfig:
    """The model of a run: that which it started from, or the configured one.

    Raises:
        RunError: model.json is damaged.
    """
    file = directory / MODEL
    if config.init_from is None:
        return dataclasses.replace(
            config.computed_model, vocabulary=tokenizer.target_size, pad=tokenizer.pad
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content.setdefault("kind", "Config")
        return training.from_plain(ModelConfig, content)
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise training.RunError(f"{file} is damaged ({error}): restore it.") from error


def save_start(start: Start, directory: Path) -> None:
    """Writes what the run needs of it: model.json, and of a published model, its names."""
    write_atomically(
        directory / MODEL,
        json.dumps(training.to_plain(start.model, ModelConfig), indent=1).encode(),
    )
    if start.pretrained is not None:
        save_description(start.pretrained, directory / TOKENIZER)


def save_compressed(start: Start, languages: LanguageConfig, directory: Path) -> None:
    """Writes a model, in as few bytes as its weights take, into a directory that is there."""
    (directory / TOKENIZER).mkdir()
    start.tokenizer.save(directory / TOKENIZER)
    if start.pretrained is not None:
        save_description(start.pretrained, directory / TOKENIZER)
    arrays = {name: _stored(x) for name, x in training.flatten(start.params).items()}
    training.save_arrays(directory / WEIGHTS, arrays)
    content = {
        "model": training.to_plain(start.model, ModelConfig),
        "decoding": training.to_plain(start.decoding),
        "languages": training.to_plain(languages),
        "quantisation": training.to_plain(start.quantisation),
    }
    write_atomically(directory / COMPRESSED, json.dumps(content, indent=1).encode())


def _of_compressed(directory: Path, asked: LanguageConfig) -> Start:
    file = directory / COMPRESSED
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model = training.from_plain(ModelConfig, content["model"])
        decoding = training.from_plain(DecodingConfig, content["decoding"])
        languages = training.from_plain(LanguageConfig, content["languages"])
        how = training.from_plain(Quantisation, content["quantisation"])
    except (KeyError, OSError, StopIteration, TypeError, ValueError) as error:
        raise training.RunError(f"{file} is damaged ({error}): restore it.") from error
    if asked != NO_LANGUAGES:
        languages = asked
    tag = None
    if is_run(directory):
        config = read_run(directory)
        tag, languages = _tag(directory, config, languages), config.languages
    pretrained, tokenizer = _tokenizer(directory, languages, tag)
    like = model_shapes(model, how)
    shapes = training.flatten(like)
    stored = jax.eval_shape(lambda: {n: _stored(_zeros(x)) for n, x in shapes.items()})
    try:
        arrays = training.load_arrays(directory / WEIGHTS, stored)
    except training.RunError as error:
        raise training.RunError(
            f"{directory / WEIGHTS} is missing, cut short or damaged: make the model anew."
        ) from error
    leaves = [
        unpack(arrays[name], x.shape)
        if x.dtype == jnp.int4
        else jnp.asarray(arrays[name])
        for name, x in shapes.items()
    ]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    if pretrained is not None:
        # A pruned one has no place in the checkpoint it came from.
        whole = model_shapes(pretrained.config) == model_shapes(model)
        pretrained = dataclasses.replace(pretrained, params=params) if whole else None
    return Start(model, params, tokenizer, decoding, pretrained, how)


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


def _stored(x: jax.Array) -> jax.Array:
    """Integers of 4 bits take a byte each on most devices, and in files."""
    return pack(x) if x.dtype == jnp.int4 else x


def _tokenizer(
    directory: Path, languages: LanguageConfig, tag: str | None
) -> tuple[Pretrained | None, SentenceTokenizer]:
    """What a run or a compressed model keeps beside its weights; tag: see `_tag`."""
    pretrained = load_description(directory / TOKENIZER)
    try:
        if pretrained is None:
            own = Tokenizer.load(directory / TOKENIZER)
            return None, own if tag is None else own.tagged(tag)
        return pretrained, published_tokenizer(
            directory / TOKENIZER, pretrained, languages
        )
    except data.DataError as error:
        raise training.RunError(str(error)) from error


def quantised(start: Start, how: Quantisation) -> Start:
    """A model with its weights rounded; how.weights None, or already so: as it is."""
    if start.quantisation == how:
        return start
    params = quantised_params(start.model, start.params, how)
    return start._replace(params=params, quantisation=how)


def _of_run(
    directory: Path, checkpoint: Checkpoint | None, languages: LanguageConfig
) -> Start:
    config = read_run(directory)
    tag = _tag(directory, config, languages)
    pretrained, tokenizer = _tokenizer(directory, config.languages, tag)
    model = run_model(config, tokenizer, directory)
    if checkpoint is None and (config.gates.on or config.sparsity.on):
        # The best is often one from before heads or weights went.
        checkpoint = "latest" if config.training.average == 1 else None
    params = training.load_params(
        directory,
        model_shapes(model, gates=config.gates),
        checkpoint=checkpoint,
        average=config.training.average,
        finetune=config.finetune,
    )
    params = folded_params(model, params, config.gates)
    if pretrained is not None and isinstance(model, seq2seq.Config):
        pretrained = dataclasses.replace(pretrained, config=model, params=params)
    start = Start(model, params, tokenizer, config.decoding, pretrained)
    return quantised(start, config.quantise)


def _tag(
    directory: Path, config: TranslationConfig, languages: LanguageConfig
) -> str | None:
    """What stands before every source, for a run to translate into the language asked for.

    Raises:
        RunError: it does not know the languages.
    """
    if languages == NO_LANGUAGES:
        return None
    known = f"{directory} is a run, whose languages are those it was trained with: "
    if not isinstance(config.data, MultilingualData):
        raise training.RunError(known + "leave out the options of languages.")
    pairs, asked = config.data.pairs, (languages.source, languages.target)
    fits = any(all(a in (None, b) for a, b in zip(asked, pair)) for pair in pairs)
    if not fits or languages.prefix or languages.target is None:
        ways = ", ".join(f"{source} to {target}" for source, target in pairs)
        raise training.RunError(f"{known}choose a target language of {ways}.")
    return language_tag(languages.target) if config.data.symbols else None
