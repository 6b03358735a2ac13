"""Commands that look at what a model has learned: plot, align."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv_jax.cli.options import Align, Plot, check_language, load_model, own_data
from qkv_jax.cli.parsing import PROGRAM, UsageError, nearest, parse, write_lines

OF_A_SENTENCE = {"attention", "alignment", "page"}
OF_HEADS = {"heads", "spans"}
# Drawn from what lies beside a model, which is not loaded.
OF_FILES = {"curves", "kept"}
CROSS = "cross-attention layer"


def plot(arguments: list[str]) -> None:
    options = parse("plot", Plot, arguments)
    from qkv_jax.tasks import is_task
    from qkv_jax.translation import is_run

    _check(options)
    run, task = is_run(options.model), is_task(options.model)
    usual = ["curves"] * run + ["attention"] * (not task)
    what = set(options.what or usual)
    if "curves" in what and not run:
        raise UsageError(f"{options.model} is no run, which has curves")
    if task and what != {"curves"}:
        raise UsageError(f"{options.model} does not translate: it has --what curves")
    output = options.output or options.model
    drawn = []
    if what - OF_FILES:
        drawn = _draw(options, what, output)
    if "kept" in what:
        drawn.append(_kept(options.model, output))
    if "curves" in what:
        _curves(options.model, _directory(output))
        drawn.insert(0, "curves.png")
    print("\n".join(str(output / name) for name in drawn))


def _check(options: Plot) -> None:
    if (options.source is None) != (options.target is None):
        raise UsageError("--source and --target go together")
    if options.sentences < 1:
        raise UsageError(f"--sentences must be positive; got {options.sentences}")
    if options.text is not None and not options.text.strip():
        raise UsageError("--text is blank: give a sentence")


def _directory(path: Path) -> Path:
    """A directory for the pictures, made where it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UsageError(f"{path} cannot hold the pictures: {reason}")
    return path


def _curves(run: Path, output: Path) -> None:
    from qkv_jax import viz

    try:
        viz.plot_curves(run / "metrics.jsonl", output / "curves.png")
    except (OSError, ValueError) as error:
        raise UsageError(f"the run's curves cannot be drawn: {error}") from error


def _kept(model: Path, output: Path) -> str:
    from qkv_jax.translation.compress import kept_heads
    from qkv_jax.translation.draw import draw_kept

    found = kept_heads(model)
    draw_kept(*found, _directory(output) / "kept.png")
    return "kept.png"


def _draw(options: Plot, what: set[str], output: Path) -> list[str]:
    """Draws each of `what` but OF_FILES, and returns the names of the files."""
    if options.text is not None or options.source is not None:
        check_language(options)
    translator = load_model(options)
    cross = translator.config.cross_layers
    layers = {
        "attention": _layer(options.layer, translator.attention_layers, cross[-1])
    }
    if "alignment" in what:
        layers["alignment"] = _layer(options.layer, cross, cross[-2:][0], CROSS)
    train, held_out = _text(options, what)
    trees = _trees(options.dependencies)
    _directory(output)
    drawn = []
    if what & OF_A_SENTENCE:
        watched = translator.watch(options.text or held_out[0][0])
        drawn += _draw_sentence(watched, what, output, layers)
    if what - OF_A_SENTENCE - OF_FILES:
        pairs = held_out[: options.sentences]
        drawn += _draw_model(translator, what, output, train, pairs, trees)
    return drawn


def _draw_sentence(
    watched: Any, what: set[str], output: Path, layers: dict[str, str]
) -> list[str]:
    from qkv_jax.translation import draw

    drawn = []
    if "attention" in what:
        layer = layers["attention"]
        draw.draw_attention(watched, output / "attention.png", layer=layer)
        drawn.append("attention.png")
    if "alignment" in what:
        if not any(watched.target.text):
            raise UsageError("the translation of the sentence has no word to align")
        layer = layers["alignment"]
        draw.draw_alignment(watched, output / "alignment.png", layer=layer)
        drawn.append("alignment.png")
    if "page" in what:
        draw.write_page(watched, output / "page.html")
        drawn.append("page.html")
    return drawn


def _draw_model(
    translator: Any,
    what: set[str],
    output: Path,
    train: Sequence[Any],
    pairs: Sequence[Any],
    trees: Sequence[Any],
) -> list[str]:
    from qkv_jax.translation import draw
    from qkv_jax.translation.heads import head_rows

    drawn = []
    counts = draw.count_tokens(translator, train)
    if what & OF_HEADS:
        heads = draw.measure_heads(translator, pairs, counts, trees)
    if "heads" in what:
        draw.draw_heads(heads, output / "heads.png")
        write_lines(output / "heads.tsv", head_rows(heads))
        drawn += ["heads.png", "heads.tsv"]
        _say_of_relations(heads, trees)
    if "spans" in what:
        draw.draw_spans(translator, heads, output / "spans.png")
        drawn.append("spans.png")
    if "embeddings" in what:
        draw.draw_embeddings(translator, counts, output / "embeddings.png")
        drawn.append("embeddings.png")
    return drawn


def _layer(
    given: str | None, names: Sequence[str], default: str, kind: str = "layer"
) -> str:
    if given is not None and given not in names:
        hint = nearest(given, names) or f"; there are {', '.join(names)}"
        raise UsageError(f"no {kind} {given!r}{hint}")
    return given or default


def _text(options: Plot, what: set[str]) -> tuple[list[Any], list[Any]]:
    """Pairs to count subwords in, and held-out ones; none where they are not needed."""
    from qkv_jax.data import read_pairs
    from qkv_jax.translation import is_run

    if options.source is not None:
        pairs = read_pairs(options.source, options.target)
        train = held_out = pairs
    elif options.text is not None and not what & {*OF_HEADS, "embeddings"}:
        return [], []
    elif is_run(options.model):
        corpus = own_data(options, options.model).load()
        train, held_out = corpus.train, corpus.test or corpus.valid or corpus.train
    else:
        raise UsageError(
            f"{options.model} is no run, which has text: give --source and --target"
            + (", or --text" if what <= OF_A_SENTENCE else "")
        )
    held_out = [pair for pair in held_out if pair[0].strip() and pair[1].strip()]
    if not held_out:
        raise UsageError("there is no sentence to look at: every pair has a blank side")
    return train, held_out


def _trees(path: Path | None) -> list[Any]:
    from qkv_jax.data.conllu import read_conllu

    return [] if path is None else read_conllu(path)


def _say_of_relations(heads: Sequence[Any], trees: Sequence[Any]) -> None:
    if any(head.relation for head in heads):
        return
    reason = "of --dependencies too few" if trees else "without --dependencies no"
    print(
        f"{PROGRAM}: {reason} syntactic relations are known: heads.tsv leaves these columns out",
        file=sys.stderr,
    )


def align(arguments: list[str]) -> None:
    options = parse("align", Align, arguments)
    from qkv_jax.data import read_pairs
    from qkv_jax.translation.alignment import align as align_words

    check_language(options)
    pairs = read_pairs(options.source, options.target)
    reference = _reference(options, pairs)
    translator = load_model(options)
    cross = translator.config.cross_layers
    chosen = _layer(options.layer, cross, cross[-2:][0], CROSS)
    layers = [chosen] if reference is None else cross
    found: dict[str, list[Any]] = {name: [()] * len(pairs) for name in layers}
    other = 0
    for index, watched in translator.watch_pairs(pairs, layers=layers):
        for name in layers:
            own = align_words(
                watched.weights[name], watched.source.text, watched.target.text
            )
            found[name][index] = own.pairs
        sizes = tuple(len(side.split()) for side in reversed(pairs[index]))
        other += own.weights.shape != sizes
    if other:
        print(
            f"{PROGRAM}: {other:,} of {len(pairs):,} pairs were cut (raise --max-source and "
            "--max-length) or are parted into other words than at their blanks: their links are "
            "of those words",
            file=sys.stderr,
        )
    if reference is None or options.output is not None:
        write_lines(options.output, [_pharaoh(links) for links in found[chosen]])
    if reference is not None:
        _print_scores(found, reference, options.json)


def _pharaoh(links: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{source}-{target}" for source, target in links)


def _reference(options: Align, pairs: Sequence[Any]) -> Any:
    from qkv_jax.translation.alignment_error import read_links

    if options.gold is None:
        if options.one_based or options.json:
            raise UsageError("--one-based and --json are of a --gold file: give it")
        return None
    sizes = [(len(source.split()), len(target.split())) for source, target in pairs]
    return read_links(options.gold, sizes, one_based=options.one_based)


def _print_scores(found: dict[str, list[Any]], reference: Any, as_json: bool) -> None:
    from qkv_jax.translation.alignment_error import alignment_scores

    scores = {name: alignment_scores(x, reference) for name, x in found.items()}
    if as_json:
        print(json.dumps({name: score._asdict() for name, score in scores.items()}))
        return
    print(f"{'layer':>20}  precision  recall     AER")
    for name, score in scores.items():
        print(
            f"{name:>20}  {score.precision:9.4f}  {score.recall:6.4f}  {score.error_rate:6.4f}"
        )
