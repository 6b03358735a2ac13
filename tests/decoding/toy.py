"""A language model small enough to search by hand: tables, exact in any batch.

Its state is a hash of the whole prefix, so hypotheses mixed up by a wrong `reorder` get wrong
logits. The oracles are plain Python over the same tables, and share no code with the searches.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"bos": BOS, "eos": EOS, "pad": PAD}
STATES = 97


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyCache:
    """state and beam index (B, Z), history (B, Z, M) of consumed tokens, number of calls ()."""

    state: jax.Array
    history: jax.Array
    calls: jax.Array

    def reorder(self, parents):
        rows = jnp.arange(parents.shape[0])[:, None]
        return dataclasses.replace(
            self, state=self.state[rows, parents], history=self.history[rows, parents]
        )


def toy_cache(rows, beams, max_length=16):
    """Row b starts in state rows[b], so that rows are different sentences."""
    state = jnp.broadcast_to(jnp.asarray(rows, jnp.int32)[:, None], (len(rows), beams))
    history = jnp.full((len(rows), beams, max_length), -1, jnp.int32)
    return ToyCache(state, history, jnp.zeros((), jnp.int32))


def toy_table(vocabulary, *, seed=0, spread=2.0):
    """(STATES, V) float32 logits."""
    rng = np.random.default_rng(seed)
    return (spread * rng.normal(size=(STATES, vocabulary))).astype(np.float32)


def toy_step(table):
    def step(tokens, cache):
        state = next_state(cache.state, tokens)
        history = cache.history.at[:, :, cache.calls].set(tokens)
        return jnp.asarray(table)[state], ToyCache(state, history, cache.calls + 1)

    return step


def next_state(state, token):
    return (state * 31 + token * 17 + 7) % STATES


def log_probs_after(table, row, prefix):
    """(V,) float64 log-probabilities of the token after BOS + prefix; -inf for PAD and BOS.

    What is excluded keeps its probability: the rest is not normalised anew.
    """
    state = row
    for token in (BOS, *prefix):
        state = next_state(state, token)
    logits = table[state].astype(np.float64)
    gains = logits - np.logaddexp.reduce(logits)
    gains[[PAD, BOS]] = -np.inf
    return gains


def log_prob(table, row, tokens):
    return sum(log_probs_after(table, row, tokens[:i])[t] for i, t in enumerate(tokens))


def every_hypothesis(table, row, limit, penalty):
    """All (score, tokens) with an EOS within limit, best first."""
    words = range(EOS + 1, table.shape[1])
    found = [
        (*body, EOS)
        for length in range(limit)
        for body in itertools.product(words, repeat=length)
    ]
    scored = [
        (log_prob(table, row, tokens) / penalty(len(tokens)), tokens)
        for tokens in found
    ]
    return sorted(scored, key=lambda entry: -entry[0])


def unruled(tokens, gains, last):
    return gains


def greedy_oracle(table, row, limit, rule=unruled, ends=True):
    tokens = ()
    while EOS not in tokens and len(tokens) < limit:
        last = ends and len(tokens) + 1 == limit
        gains = rule(tokens, log_probs_after(table, row, tokens), last)
        tokens += (EOS if last else int(np.argmax(gains)),)
    return tokens


def sub_sequences(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def beam_oracle(table, row, limit, beams, penalty, rule=unruled, ends=True):
    """Runs to the limit, without early exit: (score, tokens), best first.

    `rule(tokens, gains, last)` gives what tokens add after `tokens`; last: EOS is asked for. Where
    not `ends`, the token at the limit may be any.
    """
    alive, finished = [(0.0, ())], []
    for length in range(1, limit + 1):
        candidates = []
        for total, tokens in alive:
            last = ends and length == limit
            gains = rule(tokens, log_probs_after(table, row, tokens), last)
            allowed = [EOS] if last else range(len(gains))
            candidates += [
                (total + gains[token], (*tokens, token))
                for token in allowed
                if gains[token] > -np.inf
            ]
        candidates.sort(key=lambda entry: -entry[0])
        over = lambda entry, length=length: entry[1][-1] == EOS or length == limit
        ended = [entry for entry in candidates[:beams] if over(entry)]
        finished += [(total / penalty(length), tokens) for total, tokens in ended]
        alive = [entry for entry in candidates if not over(entry)][:beams]
    return sorted(finished, key=lambda entry: -entry[0])[:beams]


def run(search, table, rows, hypotheses, *, step=None, cache=None, **options):
    """A search of the toy, jitted."""

    @jax.jit
    def jitted(rows):
        return search(
            step or toy_step(table),
            toy_cache(rows, hypotheses) if cache is None else cache,
            batch_size=len(rows),
            **({"max_length": 6} | SPECIAL | options),
        )

    return jitted(jnp.asarray(rows))


def as_tuples(hypotheses, row):
    """Token tuples of the hypotheses of a row; asserts that PAD and nothing else follows EOS."""
    found = []
    for tokens, length in zip(
        np.asarray(hypotheses.tokens[row]),
        np.asarray(hypotheses.lengths[row]),
        strict=True,
    ):
        assert (tokens[length:] == PAD).all()
        found.append(tuple(tokens[:length].tolist()))
    return found
