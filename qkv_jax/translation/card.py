"""What the model card says of a translation run."""

from collections.abc import Mapping, Sequence

from qkv_jax.data import Corpus, Pair, read_pairs
from qkv_jax.training import Section
from qkv_jax.training.model_card import line_digest, table
from qkv_jax.translation.config import TranslationConfig, languages_of
from qkv_jax.translation.evaluate import METRIC_NAMES, Scores

SAMPLES = 5
FEW = 20


def summary(config: TranslationConfig) -> str:
    """What the model is."""
    source, target = (name or "several languages" for name in languages_of(config.data))
    start = config.init_from
    begun = "" if start is None else f", begun from `{start}`"
    teacher = config.distillation.teacher
    taught = "" if teacher is None else f", taught by `{teacher}`"
    return f"Translates from {source} into {target}; trained by qkv-jax{begun}{taught}."


def front(config: TranslationConfig) -> dict:
    """Metadata for the hub."""
    known = [name for name in languages_of(config.data) if name is not None]
    return {"pipeline_tag": "translation", "language": known}


def tested(
    config: TranslationConfig,
    pairs: Sequence[Pair],
    found: Sequence[str],
    scores: Scores,
) -> list[Section]:
    """Scores and samples of the test part."""
    rows = [
        (METRIC_NAMES[name], f"{getattr(scores, name):.2f}", f"`{signature}`")
        for name, signature in scores.signatures.items()
    ]
    rows += [
        ("exact match", f"{scores.exact_match:.2f}", "% of the sentences"),
        ("length ratio", f"{scores.length_ratio:.3f}", "tokens, to the reference's"),
    ]
    lengths = [
        (
            _words(group.least, group.most),
            f"{group.sentences:,}",
            f"{group.bleu:.2f}",
            f"{group.chrf:.2f}",
        )
        for group in scores.by_length
    ]
    how = config.decoding
    search = f"{how.samples} samples" if how.samples else f"{how.beams} beams"
    metrics = (
        f"On the {len(pairs):,} sentences of the test part, one reference each, with {search}:\n\n"
        + table(("metric", "score", "by sacreBLEU"), rows)
        + "\n\n"
        + table(
            (f"words of the {scores.length_of}", "sentences", "BLEU", "chrF"), lengths
        )
    )
    step = max(1, len(pairs) // SAMPLES)
    some = [
        (source, reference, text)
        for (source, reference), text in list(zip(pairs, found))[::step][:SAMPLES]
    ]
    samples = (
        f"Not chosen: one in {step:,} sentences of the test part, from the first.\n\n"
        + table(("source", "reference", "translation"), some)
    )
    return [Section("Metrics", metrics), Section("Samples", samples)]


def by_target(scores: Mapping[str, Scores]) -> list[Section]:
    """Scores of each target language, where there are several."""
    rows = [
        (target, f"{own.sentences:,}", f"{own.bleu:.2f}", f"{own.chrf:.2f}")
        for target, own in scores.items()
    ]
    head = ("into", "sentences", "BLEU", "chrF")
    return [Section("Metrics by language", table(head, rows))] if rows else []


def limits(
    config: TranslationConfig, corpus: Corpus, scores: Scores | None, cut: int
) -> Section:
    """What is known to be missing, or to go wrong.

    Args:
        config: of the run.
        corpus: it learned from.
        scores: of its test part; None: there is none.
        cut: sentences of the test part that are too long to be translated as they are.
    """
    decoding, text = config.decoding, config.text
    longer = {
        "truncate": "cut",
        "split": "translated in parts",
        "refuse": "left empty",
    }[decoding.overlong]
    learned = f"{len(corpus.train):,} pairs, the training part below"
    if text.distilled is not None:
        beside = f"{learned}, and " if text.keep_references else ""
        learned = f"{beside}what a teacher made of sources, the distilled part below"
    kind = (
        f"It learned from {learned}, and knows the kind of text that they are; on other kinds it "
        "was not tested."
    )
    length = (
        f"It learned from sentences of at most {text.max_source} subwords. Sources of more than "
        f"{decoding.max_source} are {longer} ({cut:,} of the test part); a translation ends at "
        f"{decoding.max_length}."
    )
    lines = [kind, length]
    if scores is None:
        lines.append("There is no test part: nothing was measured on held-out text.")
    else:
        known = [group for group in scores.by_length if group.sentences >= FEW]
        if len(known) > 1:
            worst = min(known, key=lambda group: group.chrf)
            lines.append(
                f"It is worst on sources of {_words(worst.least, worst.most)} words: chrF "
                f"{worst.chrf:.2f} on {worst.sentences:,} sentences, {scores.chrf:.2f} on all."
            )
        lines.append(
            "The scores compare surfaces with references; names, numbers, negation and tone were "
            "not checked, nor was anything by people."
        )
    if config.init_from is not None:
        lines.append(
            f"The limits and the licence of `{config.init_from}` are its own too."
        )
    lines.append(
        "The licence of the text, and what may be done with the model, are not known to the run."
    )
    return Section("Known limits", "\n".join(f"- {line}" for line in lines))


def material(
    config: TranslationConfig, corpus: Corpus, report: Sequence[str], tokenizer: str
) -> Section:
    """The text, so that another can tell whether theirs is the same.

    Args:
        config: of the run.
        corpus: its three parts.
        report: lines about what was made of it.
        tokenizer: the digest of the tokeniser.
    """
    parts = {"training": corpus.train, "validation": corpus.valid, "test": corpus.test}
    text = config.text
    for name, file in (
        ("back-translated", text.back_translated),
        ("distilled", text.distilled),
    ):
        if file is not None:
            parts[name] = read_pairs(file)
    rows = [
        (name, f"{len(pairs):,}", *(f"`{line_digest(side)}`" for side in zip(*pairs)))
        for name, pairs in parts.items()
        if pairs
    ]
    lines = [
        "SHA-256 of the sentences, a line each: what `sha256sum` says of a plain file of them.",
        f"Tokeniser: `{tokenizer}`.",
    ]
    if corpus.test:
        seen = {source for source, _ in corpus.train}
        again = sum(source in seen for source, _ in corpus.test)
        lines.append(
            f"Test sources that are training sources too: {again:,} of {len(corpus.test):,}."
        )
    listed = "\n".join(f"- {line}" for line in lines)
    said = "\n".join(report)
    found = table(("part", "pairs", "source", "target"), rows)
    return Section("Data", f"{found}\n\n{listed}\n\n```text\n{said}\n```")


def _words(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else f"{least} to {most}"
