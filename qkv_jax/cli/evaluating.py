"""Commands that measure models: evaluate, compare."""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from qkv_jax.cli.options import (
    Compare,
    Evaluate,
    HeldOutText,
    check_language,
    checkpoint_of,
    load_model,
)
from qkv_jax.cli.parsing import PROGRAM, UsageError, parse, read_lines, write_lines
from qkv_jax.data import HeldOut, read_held_out, read_sacrebleu_set

LABEL = 20
TESTS = ("metrics", "level", "resamples", "trials")


class Measured(NamedTuple):
    """A model's scores; its translations, and the text and the shapes of batches they are of."""

    scores: Any
    translations: list[str]
    text: HeldOut
    shapes: int


def evaluate(arguments: list[str]) -> None:
    options = parse("evaluate", Evaluate, arguments)
    from qkv_jax.tasks import is_task
    from qkv_jax.translation.evaluate import check_lengths

    models = _distinct(options)
    if any(is_task(model) for model in models):
        _evaluate_tasks(options, models)
        return
    _check_text(options)
    _as_usage(check_lengths, options.lengths)
    found = {str(model): _measure(options, model) for model in models}
    _write_translations(
        options.output, {name: one.translations for name, one in found.items()}
    )
    if options.json:
        scores = {name: one.scores.to_json() for name, one in found.items()}
        print(json.dumps(scores if len(models) > 1 else scores[str(options.model)]))
    elif len(models) == 1:
        _show_scores(*found.values())
    else:
        _show_models(found)


def compare(arguments: list[str]) -> None:
    options = parse("compare", Compare, arguments)
    from qkv_jax.translation import compare
    from qkv_jax.translation.compare import Significance, show_comparison

    systems = _distinct(options)
    if len(systems) < 2:
        raise UsageError(
            "compare needs two or more models or files of translations; the first is the baseline"
        )
    _check_text(options, sources=not all(map(_is_text, systems)))
    significance = _as_usage(
        Significance,
        tokenize=_tokenizer(options, systems),
        **{name: getattr(options, name) for name in TESTS},
    )
    text = _text_of_all(options, systems)
    lines = {
        str(system): _lines_of(system, len(text.references[0]))
        for system in systems
        if _is_text(system)
    }
    for system in systems:
        if not _is_text(system):
            translator = _load(options, system)
            lines[str(system)] = [best[0].text for best in translator(text.sources)]
    found = _as_usage(
        compare,
        {str(system): lines[str(system)] for system in systems},
        *text.references,
        sources=text.sources or None,
        significance=significance,
        examples=options.examples,
        by=options.by,
    )
    if options.output is not None:
        _write_translations(options.output, lines)
        content = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
        write_lines(options.output / "comparison.json", [content])
    if options.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    console = Console()
    for table in show_comparison(found):
        console.print(table, markup=False)
    for name, signatures in found.signatures.items():
        for kind, signature in signatures.items():
            print(f"{name} {kind}   {signature}")


def _distinct(options: Evaluate | Compare) -> tuple[Path, ...]:
    """The models, or systems, that the options name."""
    models = (options.model, *options.more)
    for model in models:
        if models.count(model) > 1:
            raise UsageError(f"{model} is named twice")
    return models


def _check_text(options: HeldOutText, *, sources: bool = True) -> None:
    """That the options name one text, and a tokeniser that there is.

    Args:
        options: the command's.
        sources: whether the text's source is needed.
    """
    from qkv_jax.translation.evaluate import make_metrics

    files = (options.source is not None, bool(options.reference))
    if options.set is not None and any(files):
        raise UsageError("give --set, or --source and --reference, not both")
    if files[0] != files[1] and (sources or files[0]):
        raise UsageError("--source and --reference go together")
    if options.pair is not None and options.set is None:
        raise UsageError("--pair is of --set")
    _as_usage(make_metrics, options.tokenize)


def _as_usage(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function returns; its complaint about an argument is one about an option."""
    try:
        return call(*arguments, **options)
    except ValueError as error:
        first, _, rest = str(error).partition(" ")
        named = first in ("tokenize", "lengths", *options)
        raise UsageError(f"--{first} {rest}" if named else str(error)) from None


def _measure(options: Evaluate, model: Path) -> Measured:
    from qkv_jax.translation import score
    from qkv_jax.translation.evaluate import comet_score

    translator = _load(options, model)
    text = _text(options, model)
    translations = [best[0].text for best in translator(text.sources)]
    scores = _as_usage(
        score,
        translations,
        *text.references,
        sources=text.sources,
        tokenize=_tokenizer(options, [model]),
        lengths=options.lengths,
        resamples=options.resamples,
    )
    if options.comet is not None and _has_comet():
        value = comet_score(
            options.comet, text.sources, translations, text.references[0]
        )
        scores = dataclasses.replace(scores, comet=value)
    return Measured(scores, translations, text, len(translator.shapes))


def _has_comet() -> bool:
    """Whether COMET is installed; where it is not, says that it is left out."""
    there = "comet" in sys.modules or importlib.util.find_spec("comet") is not None
    if not there:
        print(
            f"{PROGRAM}: COMET is left out: it is not installed (pip install unbabel-comet)",
            file=sys.stderr,
        )
    return there


def _given_text(options: HeldOutText, model: Path) -> HeldOut | None:
    """The text that the options name; None: they name none."""
    if options.set is not None:
        pair = options.pair or "-".join(filter(None, _languages(options, model)))
        if "-" not in pair:
            raise UsageError("--set needs --pair, such as --pair en-de")
        return read_sacrebleu_set(options.set, pair)
    if options.source is not None:
        return read_held_out(options.source, options.reference)
    if options.reference:
        return HeldOut([], [read_lines(path) for path in options.reference])
    return None


def _text(options: HeldOutText, model: Path) -> HeldOut:
    """What a model is measured on."""
    from qkv_jax.translation import is_run

    text = _given_text(options, model)
    if text is not None:
        return text
    if not is_run(model):
        raise UsageError(
            f"{model} is no run, which has a corpus: give --source and --reference, or --set"
        )
    pairs = getattr(_own_data(options, model).load(), options.split)
    if not pairs:
        raise UsageError(
            f"the run's corpus has no {options.split} part: give --source and --reference, or --set"
        )
    return HeldOut.of_pairs(pairs)


def _own_data(options: HeldOutText, model: Path) -> Any:
    """The data of a run; of a multilingual one, for the languages asked for, without tags."""
    from qkv_jax.data import MultilingualData
    from qkv_jax.translation import read_run

    own = read_run(model).data
    if options.target_language is None or not isinstance(own, MultilingualData):
        return own
    source, target = options.source_language, options.target_language
    kept = [p for p in own.pairs if p[1] == target and source in (None, p[0])]
    return dataclasses.replace(own, pairs=tuple(kept)) if kept else own


def _languages(options: HeldOutText, model: Path) -> tuple[str | None, str | None]:
    """Source and target language: those asked for, else those that a run has alone."""
    from qkv_jax.translation import is_run, read_run
    from qkv_jax.translation.config import languages_of

    own = languages_of(read_run(model).data) if is_run(model) else (None, None)
    return options.source_language or own[0], options.target_language or own[1]


def _load(options: HeldOutText, model: Path) -> Any:
    """A model's translator. Languages that are all it knows need not be told."""
    from qkv_jax.translation import is_run, read_run
    from qkv_jax.translation.config import languages_of

    options = dataclasses.replace(options, model=model)
    if options.source is not None or options.set is not None:
        check_language(options)
    asked = (options.source_language, options.target_language)
    if is_run(model):
        known = languages_of(read_run(model).data)
        if all(x in (None, y) for x, y in zip(asked, known)):
            options = dataclasses.replace(
                options, source_language=None, target_language=None
            )
    return load_model(options)


def _text_of_all(options: Compare, systems: Sequence[Path]) -> HeldOut:
    """The text that all systems are compared on."""
    from qkv_jax.translation import is_run

    runs = [system for system in systems if is_run(system)]
    given = _given_text(options, (runs or systems)[0])
    if given is not None:
        return given
    if not runs:
        raise UsageError(
            "none of these is a run, which has a corpus: give --reference (and --source), or --set"
        )
    text = _text(options, runs[0])
    for run in runs[1:]:
        if _text(options, run) != text:
            raise UsageError(
                f"{runs[0]} and {run} have unlike {options.split} parts: give --source and "
                "--reference, or --set"
            )
    return text


def _tokenizer(options: HeldOutText, models: Sequence[Path]) -> str | None:
    """What BLEU splits the text into words by: as asked for, else by the target language."""
    from qkv_jax.translation import is_run
    from qkv_jax.translation.evaluate import bleu_tokenizer

    if options.tokenize is not None:
        return options.tokenize
    if options.pair is not None:
        return bleu_tokenizer(options.pair.split("-")[-1])
    runs = [model for model in models if is_run(model)]
    return bleu_tokenizer(_languages(options, (runs or models)[0])[1])


def _is_text(system: Path) -> bool:
    """Whether a system is a file of translations."""
    return system.is_file() and system.suffix != ".npz"


def _lines_of(file: Path, count: int) -> list[str]:
    lines = [line.rstrip() for line in read_lines(file)]
    if len(lines) != count:
        raise UsageError(
            f"{file} must have a line for each of {count} sentences; it has {len(lines)}"
        )
    return lines


def _write_translations(
    output: Path | None, translations: Mapping[str, list[str]]
) -> None:
    """A file of one model's, or a directory with a file of each model's."""
    from qkv_jax.translation.compare import short_names

    if output is None:
        return
    if len(translations) == 1:
        write_lines(output, *translations.values())
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made: {error.strerror}") from error
    shown = short_names(list(translations))
    for name, lines in translations.items():
        file = re.sub(r"[^\w.-]+", "_", shown[name]).strip("_.") or "translations"
        write_lines(output / f"{file.removesuffix('.txt')}.txt", lines)


def _show_scores(found: Measured) -> None:
    """One model's scores, a line each, and those of each group of lengths."""
    scores = found.scores
    for name, signature in scores.signatures.items():
        within = f" ± {scores.intervals[name]:.2f}" if scores.intervals else ""
        print(f"{name:>{LABEL}} {getattr(scores, name):6.2f}{within}   {signature}")
    if scores.comet is not None:
        print(f"{'comet':>{LABEL}} {scores.comet:6.4f}")
    print(
        f"{'exact_match':>{LABEL}} {scores.exact_match:6.2f}   % of the sentences\n"
        f"{'length_ratio':>{LABEL}} {scores.length_ratio:6.3f}   {scores.sentences:,} sentences "
        f"in batches of {found.shapes} shapes"
    )
    for group in scores.by_length:
        words = f"{group.least}-{group.most}" if group.most else f"{group.least}-"
        print(
            f"{f'{words} words':>{LABEL}}   bleu {group.bleu:.2f}  chrf {group.chrf:.2f}  "
            f"length_ratio {group.length_ratio:.3f}  {group.sentences:,} sentences, by their "
            f"{scores.length_of}"
        )


def _show_models(found: Mapping[str, Measured]) -> None:
    """A table of several models' scores."""
    from qkv_jax.translation.compare import short_names
    from qkv_jax.translation.evaluate import METRIC_NAMES

    first, *others = found.values()
    table = Table()
    table.add_column("model", overflow="fold")
    names = dict(METRIC_NAMES)
    if first.scores.comet is not None:
        names["comet"] = "COMET"
    for title in (*names.values(), "exact", "length"):
        table.add_column(title, justify="right")
    shown = short_names(list(found))
    for model, one in found.items():
        cells = [f"{getattr(one.scores, name):.2f}" for name in names]
        if one.scores.intervals:
            within = [one.scores.intervals.get(name) for name in names]
            cells = [
                text if x is None else f"{text} ± {x:.1f}"
                for text, x in zip(cells, within)
            ]
        cells += [f"{one.scores.exact_match:.2f}", f"{one.scores.length_ratio:.3f}"]
        table.add_row(shown[model], *cells)
    Console().print(table, markup=False)
    print(f"{first.scores.sentences:,} sentences; exact: % of them; length: ratio")
    for name, signature in first.scores.signatures.items():
        print(f"{name:>{LABEL}}   {signature}")
    if any(one.text != first.text for one in others):
        print("not on the same text: the scores cannot be compared")


def _evaluate_tasks(options: Evaluate, models: Sequence[Path]) -> None:
    """Metrics of runs that learned from examples, on a part of their data."""
    from qkv_jax.tasks import is_task

    for model in models:
        if not is_task(model):
            raise UsageError(f"{model} and {options.model} are not of the same task")
    free = ("model", "more", "split", "checkpoint", "json")
    default = Evaluate(model=options.model)
    for name, value in vars(options).items():
        if name not in free and value != getattr(default, name):
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is of translation, and {options.model} does none"
            )
    found = {str(model): _task_metrics(options, model) for model in models}
    values = found[str(options.model)]
    if options.json:
        print(json.dumps(found if len(models) > 1 else values))
    elif len(models) == 1:
        for name, value in values.items():
            print(f"{name:>{LABEL}} {value:.4f}")
    else:
        names = list(dict.fromkeys(name for one in found.values() for name in one))
        table = Table("model", *names)
        for title, one in found.items():
            table.add_row(
                title, *(f"{one[name]:.4f}" if name in one else "" for name in names)
            )
        Console().print(table, markup=False)


def _task_metrics(options: Evaluate, model: Path) -> dict[str, float]:
    from qkv_jax.tasks import load_task

    trained = load_task(model, checkpoint=checkpoint_of(options.checkpoint))
    arrays = getattr(trained.splits, options.split)
    if not arrays:
        raise UsageError(f"the run's data has no {options.split} part")
    return trained.evaluate(arrays)
