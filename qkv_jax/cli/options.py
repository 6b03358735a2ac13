"""The options of the commands that use a model."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from qkv_jax.cli.parsing import UsageError

Picture = Literal[
    "curves", "attention", "alignment", "heads", "kept", "spans", "embeddings", "page"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """What every command that uses a model takes.

    Attributes:
        model: directory of a run, of an imported or published model, or a name on the hub.
        ensemble: more models, which decide with it by the mean of their log-probabilities.
        checkpoint: of a run: a step, "best", "latest" or "average"; default as it is configured.
        source_language, target_language: of a model for several, such as "eng_Latn" or "de".
        source_prefix: text before every source, such as "translate English to German: ".
        alpha: of the length penalty.
        max_source: tokens of the longest source; a longer one is cut, or as --overlong says.
        max_length: tokens of the longest translation.
    """

    model: tyro.conf.Positional[Path]
    ensemble: tuple[Path, ...] = ()
    checkpoint: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None
    alpha: float | None = None
    max_source: int | None = None
    max_length: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(Use):
    """How translations are looked for; what is not given is as the model is configured.

    Attributes:
        beams: hypotheses kept in the search; 1: greedy.
        exact: whether to search until nothing better is possible.
        min_length: fewest tokens of a translation.
        no_repeat_ngram: n: no n tokens in a row occur twice.
        repetition_penalty: above 1: what was said becomes less likely.
        overlong: what becomes of longer sources: they are cut ("truncate"), translated in parts
            ("split") or left empty ("refuse"), and counted.
        samples: draw so many translations in place of a search.
        temperature, top_k, top_p, typical: of the distribution they are drawn from.
        seed: of the samples.
        minimum_risk: order samples by their mean chrF against each other.
        batch_rows: sentences translated at once.
        kv_cache: whether keys and values are remembered as floats or in int8.
    """

    beams: int | None = None
    exact: bool | None = None
    min_length: int | None = None
    no_repeat_ngram: int | None = None
    repetition_penalty: float | None = None
    overlong: Literal["truncate", "split", "refuse"] | None = None
    samples: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical: float | None = None
    seed: int | None = None
    minimum_risk: bool | None = None
    batch_rows: int | None = None
    kv_cache: Literal["float", "int8"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutText(Search):
    """The text that models are measured on.

    Attributes:
        split: part of the run's own corpus.
        source: file to measure on instead, one sentence a line.
        reference: its translations, line by line; again for each further file of them.
        set: a test set that sacreBLEU knows instead, such as wmt17; it is downloaded where it is
            not in sacreBLEU's cache.
        pair: its languages, such as en-de; default those of the run.
        tokenize: of BLEU: sacreBLEU's 13a, intl, zh, char, flores200, ...; default by the target
            language.
        json: print one JSON object.
    """

    split: Literal["test", "valid"] = "test"
    source: Path | None = None
    reference: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    set: str | None = None
    pair: str | None = None
    tokenize: str | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(HeldOutText):
    """BLEU, chrF, chrF++ and TER of models on held-out text, with sacreBLEU's signatures.

    Attributes:
        more: further models; one table compares them all.
        lengths: words of the source at which the next group of sentences begins that is scored by
            itself.
        resamples: of the bootstrap that gives 95 % intervals, such as 1000; 0: none.
        comet: score by COMET too, by this model, such as Unbabel/wmt22-comet-da.
        output: file for the translations, one a line; of several models, directory for their files.
    """

    more: tyro.conf.Positional[tuple[Path, ...]] = ()
    lengths: tuple[int, ...] = (10, 20, 30, 40, 50, 60)
    resamples: int = 0
    comet: str | None = None
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(HeldOutText):
    """Which differences between systems are real: paired tests of each against the first.

    A system is a model, or a file of translations, one a line.

    Attributes:
        more: the systems that are compared with it.
        metrics: bleu, bleu_lower_tokenized, chrf, chrf_plus_plus, ter.
        level: p-value below which a difference counts as real.
        resamples: of the paired bootstrap.
        trials: of the approximate randomization.
        examples: sentences shown where a system gains most on the first, and where it loses most.
        by: what sentences are compared by.
        output: directory for comparison.json and the translations.
    """

    more: tyro.conf.Positional[tuple[Path, ...]] = ()
    metrics: tuple[str, ...] = ("bleu", "chrf", "ter")
    level: float = 0.05
    resamples: int = 1000
    trials: int = 10_000
    examples: int = 3
    by: Literal["chrf", "bleu"] = "chrf"
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate(Search):
    """Translates sentences: arguments, a file, or standard input, a line each.

    Attributes:
        text: sentences; none: lines of --input or of standard input.
        input: file to translate.
        output: file for the translations; default standard output.
        n_best: translations of each sentence, with their scores.
        align: pairs of words that look at each other, "0-0 1-2", after a tab; with --json, the
            weights too.
        json: a JSON line for each sentence: source and translations with scores.
        prefixes: file with what the translation of each line begins with; blank: anything.
        phrases: file with what the translation of each line has to hold, parted by tabs.
        banned: texts that no translation may hold.
    """

    text: tyro.conf.Positional[tuple[str, ...]] = ()
    input: Path | None = None
    output: Path | None = None
    n_best: int = 1
    align: bool = False
    json: bool = False
    prefixes: Path | None = None
    phrases: Path | None = None
    banned: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Use):
    """What a model gives to translations, as it scores its own: a line for each pair.

    Attributes:
        source, target: files, one sentence a line.
        json: a JSON line for each pair: score, log_prob, tokens.
    """

    source: Path
    target: Path
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot(Use):
    """Draws what a run did and a model has learned: NAME.png for each of --what.

    curves: the run's metrics over its steps.
    attention: all heads of one layer, over the subwords of a sentence and its translation.
    alignment: which words of the source the words of the translation look at.
    heads: entropy and role of every head over held-out text; heads.tsv has all measures.
    kept: of a pruned model, which heads stayed, and how they were measured.
    spans: how far every head looks.
    embeddings: the commonest subwords in the plane in which their vectors differ most.
    page: page.html, every head of every layer on a sentence, to hover over.

    Attributes:
        what: pictures to draw; default curves and attention.
        text: sentence of attention, alignment and page; default one of the held-out text.
        layer: of attention and alignment, such as decoder.0.cross or encoder.1.attention; default
            the last cross-attention, and for alignment the last but one.
        source, target: files to measure heads on and to count subwords in, one sentence a line;
            default the run's own text.
        sentences: held-out pairs that heads are measured on.
        dependencies: CoNLL-U file of source sentences: heads of the encoder are measured on its
            relations.
        output: directory for the pictures; default the run's.
    """

    what: tuple[Picture, ...] = ()
    text: str | None = None
    layer: str | None = None
    source: Path | None = None
    target: Path | None = None
    sentences: int = 100
    dependencies: Path | None = None
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates to try.

    Attributes:
        low, high: the first and the last; each is the one before times the same factor.
        steps: updates from one to the other.
        output: picture to draw; default runs/find-lr/<name of the experiment>.png.
    """

    low: float = 1e-5
    high: float = 1.0
    steps: int = 100
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindLr:
    """The options of find-lr besides those of the experiment.

    Attributes:
        find: which rates.
    """

    find: Rates = dataclasses.field(default_factory=Rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align(Use):
    """Which words of given translations look at which of their sources: "0-0 1-2", from 0.

    The model predicts each target, and each of its words is linked to the source word that the
    mean of a layer's heads weighs most.

    Attributes:
        source, target: files, one sentence a line.
        gold: file with reference links of each pair: "3-4" sure, "3?4" or "3p4" possible, source
            first: precision, recall and alignment error rate of every cross-attention layer.
        one_based: the gold file counts words from 1.
        layer: a cross-attention layer; default the last but one.
        output: file for the links; default standard output, without --gold.
        json: with --gold, print one JSON object.
    """

    source: Path
    target: Path
    gold: Path | None = None
    one_based: bool = False
    layer: str | None = None
    output: Path | None = None
    json: bool = False


def load_model(options: Use, *, n_best: int = 1) -> Any:
    """The translator that the options ask for, of at least n_best translations."""
    from qkv_jax.translation import DecodingConfig, LanguageConfig, load_translator

    names = {field.name for field in dataclasses.fields(DecodingConfig)}
    given = {name: x for name, x in vars(options).items() if name in names}
    given = {name: x for name, x in given.items() if x is not None}
    try:  # Of what is given, whatever the model is configured with.
        DecodingConfig(**given)
    except ValueError as error:
        raise UsageError(_as_options(str(error), given)) from None
    return load_translator(
        options.model,
        *options.ensemble,
        checkpoint=checkpoint_of(options.checkpoint),
        languages=LanguageConfig(
            source=options.source_language,
            target=options.target_language,
            prefix=options.source_prefix or "",
        ),
        n_best=n_best,
        **given,
    )


def check_language(options: Use) -> None:
    """Sources that carry no tag need the language that a multilingual run is to translate into."""
    from qkv_jax.data import MultilingualData
    from qkv_jax.translation import is_run, read_run

    if options.target_language is not None or not is_run(options.model):
        return
    known = read_run(options.model).data
    if isinstance(known, MultilingualData) and known.symbols:
        raise UsageError(
            f"{options.model} translates into {' and '.join(known.targets)}: choose one by "
            "--target-language"
        )


def own_data(options: Use, model: Path) -> Any:
    """The data of a run; of a multilingual one, for the languages asked for, without tags."""
    from qkv_jax.data import MultilingualData
    from qkv_jax.translation import read_run

    own = read_run(model).data
    if options.target_language is None or not isinstance(own, MultilingualData):
        return own
    source, target = options.source_language, options.target_language
    kept = [p for p in own.pairs if p[1] == target and source in (None, p[0])]
    return dataclasses.replace(own, pairs=tuple(kept)) if kept else own


def checkpoint_of(text: str | None) -> Any:
    """A checkpoint as `load_run` takes it."""
    if text is None or text in ("best", "latest", "average"):
        return text
    if not text.isdecimal():
        raise UsageError(
            f"--checkpoint must be a step, 'best', 'latest' or 'average'; got {text!r}"
        )
    return int(text)


def _as_options(message: str, given: dict[str, Any]) -> str:
    """A message about a field as one about its option."""
    first, _, rest = message.partition(" ")
    return f"--{first.replace('_', '-')} {rest}" if first in given else message
