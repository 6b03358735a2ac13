"""What heads of attention do over many sentences, and their roles after Voita et al. 2019."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkv_jax.data.conllu import Tree
from qkv_jax.translation.alignment import between_words, word_numbers
from qkv_jax.translation.attention import PairAttention, Tokens

FARTHEST = 8
# Relations of which a head may be, either way round: Voita et al., section 5.2.
RELATIONS = {"nsubj": "nsubj", "obj": "obj", "dobj": "obj"}
RELATIONS |= {"amod": "amod", "advmod": "advmod"}
FEWEST = 30  # of a relation, for a share of it to say anything.

# From what share on a head has a role. The first two are those of Voita et al., whose rare-word
# heads point to the rarest token in 50% to 66% of the sentences (here, twice by chance as well);
# the last is ours.
POSITIONAL, SYNTACTIC, RARE, SPECIAL = 0.9, 0.1, 0.5, 0.5


class Relation(NamedTuple):
    """The syntactic relation that a head follows best.

    Attributes:
        name: such as "amod>head", from a word to its head, or "amod<head", from a head.
        share: of the words that have one, those whose most attended word is it.
        baseline: the same, if each word looked at one fixed distance, the best for the relation.
    """

    name: str
    share: float
    baseline: float


class HeadSummary(NamedTuple):
    """What one head does; means are over the tokens that ask, special ones apart.

    Weights that are no distribution, as those of a linear kind, are taken by size, over their sum.

    Attributes:
        layer: its layer's name.
        head: from 1.
        entropy: mean entropy of the weights, in nats.
        normalised: mean of the entropy over the greatest possible, ln of the tokens in sight.
        confidence: mean of the largest weight, of those on no special token (Voita et al.,
            section 4).
        special: mean weight on special tokens: EOS, the start, codes of languages.
        distance: mean over weights of |q - k|, in tokens; of cross-attention, from the diagonal
            of the pair.
        offset: k - q where the largest weight is most often, of those that half of the tokens
            have; None for cross-attention.
        at_offset: share of the tokens that have one at this offset whose largest weight is there.
        rare: share of sentences of which the token looked at most, in sum, is the rarest (or one
            of those) in the training text.
        rare_chance: what share any fixed token would reach.
        relation: None where no trees were given, or it is not of an encoder.
    """

    layer: str
    head: int
    entropy: float
    normalised: float
    confidence: float
    special: float
    distance: float
    offset: int | None
    at_offset: float | None
    rare: float
    rare_chance: float
    relation: Relation | None = None

    @property
    def roles(self) -> list[str]:
        """What it can be called: "-1" for the token before, "amod>head", "rare", "special"."""
        roles = []
        if self.at_offset is not None and self.at_offset >= POSITIONAL:
            roles.append(f"{self.offset:+d}" if self.offset else "0")
        if self.relation and self.relation.share >= self.relation.baseline + SYNTACTIC:
            roles.append(self.relation.name)
        if self.rare >= max(RARE, 2 * self.rare_chance):
            roles.append("rare")
        if self.special >= SPECIAL:
            roles.append("special")
        return roles


def summarise_heads(
    pairs: Iterable[PairAttention],
    counts: tuple[np.ndarray, np.ndarray],
    parsed: Iterable[tuple[PairAttention, Tree]] = (),
) -> list[HeadSummary]:
    """What each head of the layers at hand does.

    Args:
        pairs: attention in held-out pairs, of some layers, the same of each.
        counts: how often each id occurs in the training text, of sources and of targets.
        parsed: attention of encoder layers in sentences with their trees; those that the
            tokeniser parts into other words are passed over.

    Raises:
        ValueError: no pair has a token.

    Source: Voita et al. 2019, arXiv 1905.09418, sections 4 and 5. Differences: the rare-word
    share counts all sentences, not only those whose rarest token is not among the 500 commonest;
    a syntactic head is 10 percentage points over the baseline; a positional one may lack the token
    at its offset, as at the end of a sentence.
    """
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for pair in pairs:
        for layer, weights in pair.weights.items():
            for name, value in _measure(pair, layer, weights, counts).items():
                sums[layer][name] = sums[layer][name] + value
    if not sums:
        raise ValueError("there must be a pair with a token on each side to look at.")
    relations = _relations(parsed)
    return [
        _summary(layer, head, layer_sums, relations.get(layer, []))
        for layer, layer_sums in sums.items()
        for head in range(len(layer_sums["entropy"]))
    ]


def _summary(
    layer: str, head: int, sums: dict[str, Any], relations: list[list[Relation]]
) -> HeadSummary:
    def mean(name: str, over: str = "rows") -> float:
        return float(sums[name][head] / sums[over])

    offset, at_offset = None, None
    if "hits" in sums:
        common = sums["possible"] >= sums["rows"] / 2
        best = int((sums["hits"][head] * common).argmax())
        offset = best - FARTHEST
        at_offset = float(sums["hits"][head, best] / max(sums["possible"][best], 1))
    own = relations[head] if relations else []
    best_relation = max(own, key=lambda x: x.share - x.baseline, default=None)
    return HeadSummary(
        layer,
        head + 1,
        mean("entropy"),
        mean("normalised"),
        mean("confidence"),
        mean("special"),
        mean("distance"),
        offset,
        at_offset,
        mean("rare", "sentences"),
        float(sums["rare_chance"] / sums["sentences"]),
        best_relation,
    )


def _measure(
    pair: PairAttention,
    layer: str,
    weights: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Sums of a layer's measures over the tokens of a pair; {} where it has none."""
    asks, seen = pair.sides(layer)
    causal, cross = seen is pair.given, layer.endswith("cross")
    if causal:  # Positions are those of the tokens that went in.
        asks = seen
    rows = np.flatnonzero(~asks.special)
    text = np.flatnonzero(~seen.special)
    if not len(rows) or not len(text):
        return {}
    # What Linformer's mixtures amount to is no distribution.
    weights = np.abs(weights[:, rows].astype(float))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    places = np.arange(len(seen.ids))
    in_sight = rows + 1 if causal else np.full(len(rows), len(places))
    from_ = (rows + 0.5) * len(places) / len(asks.ids) - 0.5 if cross else rows
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1)
    rare, chance = _rare(weights, seen, text, counts[causal])
    sums = {
        "rows": len(rows),
        "entropy": entropy.sum(-1),
        "normalised": (entropy / np.log(np.maximum(in_sight, 2))).sum(-1),
        "confidence": weights[:, :, text].max(-1).sum(-1),
        "special": weights[:, :, seen.special].sum((1, 2)),
        "distance": (weights * np.abs(places - from_[:, None])).sum((1, 2)),
        "sentences": 1,
        "rare": rare,
        "rare_chance": chance,
    }
    if cross:
        return sums
    offsets = np.arange(-FARTHEST, FARTHEST + 1)
    reached = rows[:, None] + offsets
    possible = (reached >= 0) & (reached < in_sight[:, None])
    strongest = weights.argmax(-1) - rows
    hits = (strongest[:, :, None] == offsets).sum(1)
    return sums | {"hits": hits, "possible": possible.sum(0)}


def _rare(
    weights: np.ndarray, seen: Tokens, text: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, float]:
    """(N,) whether a head looks at the rarest token most, and how likely that is by chance."""
    rarest = counts[seen.ids[text]] == counts[seen.ids[text]].min()
    return rarest[weights[:, :, text].sum(1).argmax(-1)], float(rarest.mean())


def _relations(
    parsed: Iterable[tuple[PairAttention, Tree]],
) -> dict[str, list[list[Relation]]]:
    """Of each encoder layer and head, the shares of the relations that occur often enough."""
    hits: dict[tuple[str, str], Any] = defaultdict(float)
    distances: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    totals: dict[str, int] = defaultdict(int)
    for pair, tree in parsed:
        if word_numbers(pair.source.text).max(initial=-1) + 1 != len(tree.words):
            continue
        wanted = _wanted(tree)
        for name, pairs in wanted.items():
            totals[name] += len(pairs)
            for word, others in pairs:
                for other in others:
                    distances[name][other - word] += 1
        for layer, weights in pair.weights.items():
            words = between_words(weights, pair.source.text, pair.source.text)
            strongest = words.argmax(-1)
            for name, pairs in wanted.items():
                right = [np.isin(strongest[:, word], list(x)) for word, x in pairs]
                hits[layer, name] = hits[layer, name] + np.sum(right, axis=0)
    found: dict[str, list[list[Relation]]] = defaultdict(list)
    for (layer, name), counted in hits.items():
        if totals[name] < FEWEST:
            continue
        nearest = max(distances[name].values())
        found[layer] = found[layer] or [[] for _ in counted]
        for head, count in enumerate(counted):
            share, baseline = count / totals[name], nearest / totals[name]
            found[layer][head].append(Relation(name, float(share), float(baseline)))
    return found


def _wanted(tree: Tree) -> dict[str, list[tuple[int, set[int]]]]:
    """Of each relation, either way round: words, and those that they should look at."""
    wanted: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for word, (head, relation) in enumerate(zip(tree.heads, tree.relations)):
        name = RELATIONS.get(relation)
        if name is not None and head >= 0:
            wanted[f"{name}>head"][word].add(head)
            wanted[f"{name}<head"][head].add(word)
    return {name: list(pairs.items()) for name, pairs in wanted.items()}


def head_rows(heads: Sequence[HeadSummary]) -> list[str]:
    """The summaries as a table, parted by tabs; columns that none has are left out."""
    columns: dict[str, list[Any]] = {
        name: [getattr(head, name) for head in heads]
        for name in HeadSummary._fields
        if name != "relation"
    }
    if any(head.relation for head in heads):
        for name in Relation._fields:
            title = "relation" if name == "name" else f"relation_{name}"
            columns[title] = [
                head.relation and getattr(head.relation, name) for head in heads
            ]
    columns["roles"] = [" ".join(head.roles) or "-" for head in heads]
    rows = zip(*columns.values())
    return ["\t".join(columns), *("\t".join(map(_cell, row)) for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
