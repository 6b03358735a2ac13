"""Commands that use a model: translate, score, plot."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv_jax.cli.options import (
    Plot,
    Score,
    Translate,
    check_language,
    load_model,
)
from qkv_jax.cli.parsing import (
    PROGRAM,
    UsageError,
    is_unicode,
    nearest,
    parse,
    read_lines,
    write_lines,
)

OVERLONG = {
    "truncate": "cut",
    "split": "translated in parts",
    "refuse": "left empty",
}


def translate(arguments: list[str]) -> None:
    options = parse("translate", Translate, arguments)
    from qkv_jax.translation import Wishes

    _check_counts(options)
    sentences = list(options.text) or read_lines(options.input)
    for number, sentence in enumerate(sentences, 1):
        if not is_unicode(sentence):
            raise UsageError(f"sentence {number} is not UTF-8: {sentence!r}")
    prefixes = _lines_for(sentences, "--prefixes", options.prefixes)
    phrases = _lines_for(sentences, "--phrases", options.phrases)
    wishes = Wishes(
        prefixes=prefixes,
        phrases=phrases
        and [[part for part in line.split("\t") if part.strip()] for line in phrases],
        banned=options.banned,
    )
    check_language(options)
    translator = load_model(options, n_best=options.n_best)
    found = translator(
        sentences, n_best=options.n_best, align=options.align, wishes=wishes
    )
    _report(translator, sentences, found)
    pairs = zip(sentences, found)
    write_lines(options.output, [line for p in pairs for line in _shown(*p, options)])


def score(arguments: list[str]) -> None:
    options = parse("score", Score, arguments)
    from qkv_jax.data import read_pairs

    check_language(options)
    translator = load_model(options)
    pairs = read_pairs(options.source, options.target)
    found = translator.score(pairs)
    if options.json:
        lines = [json.dumps(one._asdict()) for one in found]
    else:
        lines = [f"{one.score:.4f}\t{one.log_prob:.4f}\t{one.tokens}" for one in found]
    write_lines(None, lines)


def plot(arguments: list[str]) -> None:
    options = parse("plot", Plot, arguments)
    from qkv_jax import viz
    from qkv_jax.translation import load_run, read_run
    from qkv_jax.translation.run import draw_attention

    output = options.output or options.run
    translator = load_run(options.run)
    names = translator.attention_layers
    if options.layer is not None and options.layer not in names:
        raise UsageError(f"no layer {options.layer!r}{nearest(options.layer, names)}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        viz.plot_curves(options.run / "metrics.jsonl", output / "curves.png")
    except (OSError, ValueError) as error:
        raise UsageError(f"the run's curves cannot be drawn: {error}") from error
    text = options.text
    if text is None:
        corpus = read_run(options.run).data.load()
        text = (corpus.test or corpus.valid or corpus.train)[0][0]
    draw_attention(translator, text, output / "attention.png", layer=options.layer)
    print(f"{output / 'curves.png'}\n{output / 'attention.png'}")


def _check_counts(options: Translate) -> None:
    """No more translations than are looked for, and sentences from one place."""
    if options.n_best < 1:
        raise UsageError(f"--n-best must be at least 1; got {options.n_best}")
    if options.text and options.input is not None:
        raise UsageError("give sentences as arguments or by --input, not both")
    name = "samples" if options.samples else "beams"
    count = options.samples or options.beams
    if count and 0 < count < options.n_best:
        raise UsageError(f"--n-best {options.n_best} needs --{name} of at least that")


def _lines_for(
    sentences: Sequence[str], option: str, path: Path | None
) -> list[str] | None:
    """The lines of a file that has one for each sentence."""
    if path is None:
        return None
    lines = read_lines(path)
    if len(lines) != len(sentences):
        raise UsageError(
            f"{option} {path} must have a line for each of {len(sentences)} sentences; "
            f"it has {len(lines)}"
        )
    return lines


def _report(
    translator: Any, sentences: Sequence[str], found: Sequence[Sequence[Any]]
) -> None:
    """Says how many programs were compiled, and what was not translated, or not as a whole."""
    if len(sentences) > 1:
        print(
            f"{PROGRAM}: {len(sentences):,} sentences in batches of {len(translator.shapes)} shapes",
            file=sys.stderr,
        )
    without = sum(best[0].score == -math.inf for best in found)
    if without:
        print(
            f"{PROGRAM}: {without} of {len(sentences)} sentences have no translation that fulfils "
            "all wishes: raise --max-length, or wish for less",
            file=sys.stderr,
        )
    long = translator.too_long(sentences)
    if long:
        print(
            f"{PROGRAM}: {long} of {len(sentences)} sentences were longer than "
            f"{translator.lengths[-1]} tokens and were "
            f"{OVERLONG[translator.decoding.overlong]}",
            file=sys.stderr,
        )


def _shown(source: str, translations: list[Any], options: Translate) -> list[str]:
    """The lines of output for one sentence."""
    if options.json:
        content = [_as_json(translation) for translation in translations]
        row = {"source": source, "translations": content}
        return [json.dumps(row, ensure_ascii=False)]
    lines = []
    for found in translations if options.n_best > 1 else translations[:1]:
        columns = [f"{found.score:.4f}"] if options.n_best > 1 else []
        columns.append(found.text)
        if options.align:
            columns.append(found.alignment.pharaoh if found.alignment else "")
        lines.append("\t".join(columns))
    return lines or [""]


def _as_json(translation: Any) -> dict[str, Any]:
    # JSON knows no infinity.
    score = translation.score if math.isfinite(translation.score) else None
    content = {"text": translation.text, "score": score}
    if translation.alignment is not None:
        content["alignment"] = translation.alignment.pharaoh
        content["weights"] = translation.alignment.weights.round(4).tolist()
    return content
