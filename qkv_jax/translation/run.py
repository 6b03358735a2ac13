"""A whole run: text in, a trained, evaluated model on disk out; and back from disk."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkv_jax import data, training
from qkv_jax.data import EncodedPairs, Pair, SentenceTokenizer
from qkv_jax.translation import card
from qkv_jax.translation.config import TranslationConfig, languages_of
from qkv_jax.translation.evaluate import (
    Scores,
    bleu_tokenizer,
    corpus_bleu,
    score,
    score_by_target,
)
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import (
    ModelConfig,
    check_mesh,
    folded_params,
    gated_params,
    init_params,
    params_digest,
    quantised_params,
)
from qkv_jax.translation.start import (
    TOKENIZER,
    Checkpoint,
    Start,
    check_prunable,
    load_translator,
    read_run,
    save_start,
)
from qkv_jax.translation.teacher import (
    Teacher,
    load_teacher,
    make_teacher,
)
from qkv_jax.translation.tickets import begun
from qkv_jax.translation.translator import Translator

VALIDATION_BUCKETS = 4


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Text made ready: the corpus, its tokeniser, and the training and validation batches."""

    corpus: data.Corpus
    tokenizer: SentenceTokenizer
    stream: data.BatchStream
    valid: EncodedPairs
    report: list[str]


def prepare(
    config: TranslationConfig,
    *,
    tokenizer: SentenceTokenizer | None = None,
    rows_multiple: int = 1,
    share: tuple[int, int] = (0, 1),
) -> Prepared:
    """Reads, filters, tokenises and batches the corpus of a configuration.

    Args:
        config: of the run.
        tokenizer: None: one is trained on the corpus.
        rows_multiple: what the rows of every batch are a multiple of.
        share: which block of its rows the stream gives, see `BatchStream`.

    Raises:
        DataError: the text cannot be read, or nothing is left of it.
    """
    text, corpus = config.text, config.data.load()
    made, symbols = [], list(corpus.symbols)
    if text.back_translated is not None:
        made = data.tagged(data.BACK_TRANSLATED, data.read_pairs(text.back_translated))
        symbols.append(data.BACK_TRANSLATED)
    taught = [] if text.distilled is None else data.read_pairs(text.distilled)
    own = corpus.train if text.distilled is None or text.keep_references else []
    train, filtered = data.filter_pairs(own + taught + made, text.filters)
    if not train:
        raise data.DataError(
            f"no training pair is left ({filtered}): loosen text.filters, or use other text"
        )
    if tokenizer is None:
        tokenizer = data.train_tokenizer(
            [side for pair in train for side in pair],
            vocab_size=text.vocabulary,
            model_type=text.tokenizer,
            symbols=symbols,
        )
    pairs = data.encode_pairs(train, tokenizer)
    resample = _sampler(config, train, tokenizer, symbols)
    lengths = [side.lengths for side in pairs]
    if resample is not None:
        # The longest row holds whatever it would without sampling.
        drawn = zip(resample(0), lengths)
        lengths = [np.append(side.lengths, usual.max()) for side, usual in drawn]
    buckets = data.choose_buckets(
        *lengths,
        count=text.buckets,
        max_source=text.max_source,
        max_target=text.max_target,
    )
    stream = data.BatchStream(
        pairs,
        buckets,
        target_tokens=text.batch_tokens,
        source_tokens=text.batch_source_tokens,
        rows_multiple=rows_multiple,
        overlong=text.overlong,
        packing=text.packing,
        seed=config.training.seed,
        share=share,
        resample=resample,
    )
    report = [] if corpus.report is None else [f"corpus: {corpus.report}"]
    report += [
        *([f"back-translated: {len(made):,} pairs"] if made else []),
        *([f"distilled: {len(taught):,} pairs"] if text.distilled else []),
        f"filters: {filtered}",
        f"parts: {len(train):,} training, {len(corpus.valid):,} validation, {len(corpus.test):,} test",
        f"vocabulary: {tokenizer.target_size:,} subwords",
        str(stream.report()),
    ]
    return Prepared(
        corpus, tokenizer, stream, data.encode_pairs(corpus.valid, tokenizer), report
    )


def _sampler(
    config: TranslationConfig,
    pairs: Sequence[Pair],
    tokenizer: SentenceTokenizer,
    symbols: Sequence[str],
) -> data.SubwordSampler | None:
    text = config.text
    if text.sampling is None:
        return None
    if not isinstance(tokenizer, data.Tokenizer):
        raise data.DataError(
            f"text.sampling draws from the SentencePiece model of a run; {config.init_from} has a "
            "published tokeniser: use --text.sampling None"
        )
    return data.SubwordSampler(
        pairs,
        tokenizer,
        alpha=text.sampling,
        nbest=text.sampling_nbest,
        seed=config.training.seed,
        symbols=symbols,
    )


def make_task(config: TranslationConfig, mesh: jax.sharding.Mesh) -> training.Task:
    """What a configuration trains, on a mesh.

    Raises:
        DataError: the text cannot be used.
        RunError: the mesh does not fit the model.
    """
    multiple = training.batch_shares(mesh) * config.training.accumulate
    (start, masks), share = begun(config), training.row_share(mesh)
    tutor = load_teacher(config)
    given = start or tutor
    prepared = prepare(
        config,
        tokenizer=None if given is None else given.tokenizer,
        rows_multiple=multiple,
        share=share,
    )
    if config.training.patience is not None and not prepared.corpus.valid:
        raise data.DataError(
            "training.patience needs validation text: give the corpus a validation part, or "
            "--training.patience None"
        )
    tokenizer = prepared.tokenizer
    model = _model(config, start, tokenizer)
    try:
        check_mesh(model, mesh.shape)
    except ValueError as error:
        raise training.RunError(f"mesh: {error}") from error
    if config.gates.on:
        check_prunable(model, config.init_from or "the model", heads=True)
    teacher = make_teacher(config, tutor, model=model, tokenizer=tokenizer, mesh=mesh)

    def save(directory: Path) -> None:
        tokenizer.save(directory / TOKENIZER)
        if start is not None:
            save_start(start._replace(model=model), directory)

    def make_params() -> Any:
        made = init_params(model, seed=config.training.seed)
        return gated_params(model, made, config.gates)

    has_valid = len(prepared.valid.source) > 0
    return training.Task(
        params=make_params
        if start is None
        else gated_params(model, start.params, config.gates),
        loss_fn=_loss(config, model, tokenizer, teacher),
        iterator=data.train_iterator(prepared.stream),
        share=share,
        evaluate=_validation(config, model, prepared, mesh) if has_valid else None,
        finetune=config.finetune,
        sparsity=config.sparsity,
        masks=masks,
        report=prepared.report,
        identity={
            "tokenizer": tokenizer.digest,
            "batch_rows": [b.rows for b in prepared.stream.report().buckets],
            **({} if tutor is None else {"teacher": params_digest(tutor.params)}),
        },
        data=("text or tokeniser", tokenizer.digest),
        unit="target tokens",
        score_first=start is not None,
        save=save,
        finish=lambda directory: _finish(config, directory, prepared, mesh),
    )


def _finish(
    config: TranslationConfig,
    directory: Path,
    prepared: Prepared,
    mesh: jax.sharding.Mesh,
) -> training.Outcome:
    """Draws the trained run, and scores it on the test part."""
    corpus = prepared.corpus
    translator = load_run(directory, mesh=mesh)
    if jax.process_count() > 1:
        # The others do not draw, so nothing that is drawn may need their devices.
        drawer = load_run(
            directory, mesh=training.make_mesh(devices=jax.local_devices())
        )
    else:
        drawer = translator
    if training.is_first():
        # Imported here: matplotlib takes most of a second.
        from qkv_jax.translation.draw import draw_run

        draw_run(directory, drawer, (corpus.test or corpus.train)[:50])
    results: dict[str, Any] = {}
    scores, sections, cut = None, [], 0
    if corpus.test:
        tokenize = bleu_tokenizer(languages_of(config.data)[1])
        scores, found = evaluate_run(translator, corpus.test, tokenize=tokenize)
        sections = card.tested(config, corpus.test, found, scores)
        cut = translator.too_long([source for source, _ in corpus.test])
        by_target = score_by_target(config.data, corpus.test, found)
        sections += card.by_target(by_target)
        results["test"] = scores.to_json()
        if by_target:
            results["test_by_target"] = {
                name: own.to_json() for name, own in by_target.items()
            }
    if training.is_first():
        digest = prepared.tokenizer.digest
        sections.append(card.limits(config, corpus, scores, cut))
        sections.append(card.material(config, corpus, prepared.report, digest))
    return training.Outcome(
        results=results,
        summary=card.summary(config),
        sections=sections,
        front=card.front(config),
    )


def load_run(
    directory: str | Path,
    *,
    checkpoint: Checkpoint | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **decoding: Any,
) -> Translator:
    """The model of a run, ready to translate.

    Args:
        directory: of the run.
        checkpoint: a step, "best", "latest", or "average" of the last `training.average`; None:
            "average" where the run is configured for it, else "best".
        mesh: see `Translator`.
        **decoding: fields of `DecodingConfig` to change; None: as configured.

    Raises:
        RunError: it is no run, or its checkpoint is missing or damaged.
    """
    read_run(directory)
    return load_translator(directory, checkpoint=checkpoint, mesh=mesh, **decoding)


def evaluate_run(
    translator: Translator, pairs: Sequence[Pair], *, tokenize: str | None = None
) -> tuple[Scores, list[str]]:
    """Scores of a model on (source, reference) pairs, and its translations.

    Args:
        translator: the model.
        pairs: at least one.
        tokenize: of BLEU, see `make_metrics`.
    """
    sources, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    translations = [best[0].text for best in translator(sources)]
    found = score(translations, references, sources=sources, tokenize=tokenize)
    return found, translations


def _model(
    config: TranslationConfig, start: Start | None, tokenizer: SentenceTokenizer
) -> ModelConfig:
    if start is not None:
        return start.model
    return dataclasses.replace(
        config.computed_model, vocabulary=tokenizer.target_size, pad=tokenizer.pad
    )


def _loss(
    config: TranslationConfig,
    model: ModelConfig,
    tokenizer: SentenceTokenizer,
    teacher: Teacher | None = None,
) -> training.step.LossFn:
    return make_loss(
        model,
        config.label_smoothing,
        r_drop=config.r_drop,
        start=tokenizer.start,
        eos=tokenizer.eos,
        quantise=config.quantise,
        teacher=teacher,
        gates=config.gates,
    )


def _validation(
    config: TranslationConfig, model: ModelConfig, prepared: Prepared, mesh
) -> Callable[[Any], dict[str, float]]:
    """parameters -> loss per token on the validation pairs, and BLEU of the first of them."""
    valid, text = prepared.valid, config.text
    buckets = data.choose_buckets(
        valid.source.lengths,
        valid.target.lengths,
        count=VALIDATION_BUCKETS,
        max_source=text.max_source,
        max_target=text.max_target,
    )
    eval_step = training.make_eval_step(
        _loss(config, model, prepared.tokenizer), mesh=mesh
    )
    shown = prepared.corpus.valid[: config.validation_sentences]
    greedy = dataclasses.replace(config.decoding, beams=1)
    tokenize = bleu_tokenizer(languages_of(config.data)[1])

    def evaluate(params: Any) -> dict[str, float]:
        batches = data.eval_batches(
            valid,
            buckets,
            target_tokens=text.batch_tokens,
            rows_multiple=training.batch_shares(mesh),
        )
        means = training.evaluate_loss(
            eval_step, params, (batch for _, batch in batches), mesh=mesh
        )
        del means["tokens"]
        if shown:
            ungated = folded_params(model, params, config.gates)
            translator = Translator(
                model,
                quantised_params(model, ungated, config.quantise),
                prepared.tokenizer,
                decoding=greedy,
                mesh=mesh,
                quantisation=config.quantise,
            )
            found = [best[0].text for best in translator([pair[0] for pair in shown])]
            means["bleu"] = corpus_bleu(found, [pair[1] for pair in shown], tokenize)
        return means

    return evaluate


def read_result(directory: str | Path) -> dict[str, Any] | None:
    """What a finished run wrote into result.json; None where it has not finished."""
    file = Path(directory) / training.runs.RESULT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
