"""How fast is translation, against `transformers` on torch and against CTranslate2?

    python -m benchmarks.decode

Needs the extra `peers` (`make test-peers` sets up `.venv-peers` with it). All three search with
the same random weights (MarianMTModel's architecture) in float32, for the same number of tokens:
no special token is ever likely, so none ends a translation early. Ours ends each with an EOS,
which takes it one step more than the others.

Each side has a process of its own, so that no thread pool spins beside another's, and they take
turns. The share of rows that have the same hypotheses, token by token, is printed too; their order
is not compared, since it is EOS that may decide it on our side.
"""

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = [PAD, BOS, EOS, UNK]
# A token with this bias has no chance, and costs no digits of what it is summed with.
NEVER = -30.0
# Hypotheses of all rows (B, Z, T), best first, without EOS.
Tokens = list[list[list[int]]]
Search = Callable[["Case"], Tokens]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model and the cores; the same for all sides."""

    d_model: int = 512
    d_ff: int = 2048
    heads: int = 8
    layers: int = 6
    """In the encoder, and again in the decoder."""
    vocabulary: int = 8_000
    tokens: int = 32
    """Of each translation."""
    rows: int = 64
    """Sentences that are translated at once, of a corpus."""
    cores: int = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sentences to translate with a beam."""

    name: str
    beams: int
    tokens: int
    sentences: list[list[int]]


def cases(setup: Setup) -> list[Case]:
    """The batch of 32 full rows and the corpus of 256 of mixed length, each by beam and greedy."""
    rng = np.random.default_rng(0)

    def sentences(lengths: np.ndarray) -> list[list[int]]:
        rows = [rng.integers(UNK + 1, setup.vocabulary, n - 1) for n in lengths]
        return [[*map(int, row), EOS] for row in rows]

    batch = sentences(np.full(32, 24))
    lengths = np.round(rng.lognormal(np.log(20), 0.6, 256)).astype(int)
    # Long enough that no side's limit on the ratio of lengths comes into play.
    corpus = sentences(lengths.clip(12, 100))
    return [
        Case(
            name=f"{len(rows)} {kind}, {'greedy' if beams == 1 else f'beam {beams}'}",
            beams=beams,
            tokens=setup.tokens,
            sentences=rows,
        )
        for kind, rows in (("x 24 tokens", batch), ("of mixed length", corpus))
        for beams in (4, 1)
    ]


def save_model(setup: Setup, directory: str) -> None:
    """Writes a random Marian model, in which special tokens have no chance."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=setup.vocabulary,
        d_model=setup.d_model,
        encoder_layers=setup.layers,
        decoder_layers=setup.layers,
        encoder_attention_heads=setup.heads,
        decoder_attention_heads=setup.heads,
        encoder_ffn_dim=setup.d_ff,
        decoder_ffn_dim=setup.d_ff,
        activation_function="relu",
        max_position_embeddings=256,
        init_std=setup.d_model**-0.5,
        scale_embedding=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        forced_eos_token_id=None,
        decoder_start_token_id=BOS,
    )
    torch.manual_seed(0)
    model = MarianMTModel(config)
    model.final_logits_bias[:, SPECIAL] = NEVER
    model.save_pretrained(directory)


def by_length(sentences: list[list[int]], rows: int) -> Iterator[list[int]]:
    """Indices of batches of about the same length."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    yield from (order[start : start + rows] for start in range(0, len(order), rows))


def transformers_search(setup: Setup, directory: str) -> Search:
    """`generate`, in batches of sentences sorted by length."""
    import torch
    from transformers import MarianMTModel

    torch.set_num_threads(setup.cores)
    model = MarianMTModel.from_pretrained(directory, attn_implementation="sdpa").eval()

    def search(case: Case) -> Tokens:
        found: Tokens = [[] for _ in case.sentences]
        for indices in by_length(case.sentences, setup.rows):
            rows = [torch.tensor(case.sentences[i]) for i in indices]
            source = torch.nn.utils.rnn.pad_sequence(rows, True, PAD)
            with torch.inference_mode():
                out = model.generate(
                    source,
                    attention_mask=source != PAD,
                    num_beams=case.beams,
                    num_return_sequences=case.beams,
                    min_new_tokens=case.tokens,
                    max_new_tokens=case.tokens,
                    do_sample=False,
                )
            out = out.reshape(len(indices), case.beams, -1)[..., 1:].tolist()
            for index, hypotheses in zip(indices, out):
                found[index] = hypotheses
        return found

    return search


def ctranslate2_search(setup: Setup, directory: str) -> Search:
    """`translate_batch`, which sorts by length itself."""
    import ctranslate2

    converted = convert(directory)
    translator = ctranslate2.Translator(
        converted, compute_type="float32", inter_threads=1, intra_threads=setup.cores
    )

    def search(case: Case) -> Tokens:
        results = translator.translate_batch(
            [list(map(str, sentence)) for sentence in case.sentences],
            beam_size=case.beams,
            num_hypotheses=case.beams,
            min_decoding_length=case.tokens,
            max_decoding_length=case.tokens,
            max_batch_size=setup.rows,
        )
        return [
            [list(map(int, tokens)) for tokens in result.hypotheses]
            for result in results
        ]

    return search


def convert(directory: str) -> str:
    """A CTranslate2 model beside a saved one, whose tokens are their ids in digits."""
    from ctranslate2.converters.transformers import BartLoader
    from transformers import MarianMTModel

    model = MarianMTModel.from_pretrained(directory)
    # What MarianMTLoader sets; it would also start from a row of zeros, and drop the last token.
    model.config.normalize_before = model.config.normalize_embedding = False
    spec = BartLoader().get_model_spec(model)
    tokens = [str(i) for i in range(model.config.vocab_size)]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token, spec.config.eos_token = str(BOS), str(EOS)
    spec.config.unk_token, spec.config.decoder_start_token = str(UNK), str(BOS)
    spec.validate()
    spec.optimize(quantization=None)
    converted = Path(directory) / "ctranslate2"
    converted.mkdir()
    spec.save(str(converted))
    return str(converted)


class Digits:
    """A tokeniser whose sentences are ids in digits; see `qkv_jax.data.SentenceTokenizer`."""

    pad, start, eos, unk, never = PAD, BOS, EOS, UNK, (PAD, BOS, UNK)
    prefix: tuple[int, ...] = ()
    source_ending = (EOS,)
    digest = "digits"

    def encode_source(self, sentences: list[str]) -> list[list[int]]:
        return [[*map(int, sentence.split()), EOS] for sentence in sentences]

    def decode(self, sequences: list[list[int]]) -> list[str]:
        return [" ".join(str(i) for i in ids if i != EOS) for ids in sequences]


def ours_search(setup: Setup, directory: str) -> Search:
    """`qkv_jax.translation.Translator`; of a batch of full rows, its compiled search alone."""
    from qkv_jax.interop import load
    from qkv_jax.translation import DecodingConfig, Translator

    pretrained = load(directory)
    tokenizer: Any = Digits()

    @functools.cache
    def translator(beams: int, tokens: int) -> Translator:
        decoding = DecodingConfig(
            beams=beams, batch_rows=setup.rows, max_length=tokens + 1
        )
        return Translator(
            pretrained.config, pretrained.params, tokenizer, decoding=decoding
        )

    def search(case: Case) -> Tokens:
        ours = translator(case.beams, case.tokens)
        if len({len(ids) for ids in case.sentences}) == 1:
            found = ours.search(np.array(case.sentences, np.int32))
            return np.asarray(found.tokens)[:, :, :-1].tolist()
        texts = [" ".join(map(str, ids[:-1])) for ids in case.sentences]
        return [
            [list(map(int, best.text.split())) for best in translations]
            for translations in ours(texts, n_best=case.beams)
        ]

    return search


def compilations() -> int:
    """Programs that the search was compiled to, in this process."""
    from qkv_jax.translation import search

    compiled: Any = search.search
    return compiled._cache_size()


SIDES: dict[str, Callable[[Setup, str], Search]] = {
    "transformers": transformers_search,
    "ctranslate2": ctranslate2_search,
    "ours": ours_search,
}
AIMS = {"transformers": 1.5, "ctranslate2": 1.0}


def serve(side: str, setup: Setup, directory: str, connection: Connection) -> None:
    """Answers each case's number with seconds, tokens and compilations so far; -1 ends it."""
    search, given = SIDES[side](setup, directory), cases(setup)
    connection.send(side)
    while (number := connection.recv()) >= 0:
        start = time.perf_counter()
        found = search(given[number])
        seconds = time.perf_counter() - start
        count = compilations() if side == "ours" else 0
        connection.send((seconds, found, count))


@contextmanager
def started(side: str, setup: Setup, directory: str) -> Iterator[Connection]:
    """The connection to a process of its own, with its model loaded."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=serve, args=(side, setup, directory, there), daemon=True
    )
    process.start()
    there.close()
    here.recv()
    yield here
    here.send(-1)
    process.join()


def measure(
    case: Case, number: int, connections: dict[str, Connection], rounds: int
) -> None:
    """Prints one case: seconds of each side, ours against each peer, and equal tokens."""
    seconds: dict[str, list[float]] = {side: [] for side in connections}
    found: dict[str, Tokens] = {}
    count: dict[str, int] = {}
    for turn in range(rounds + 1):  # The first warms up, and compiles.
        for side, connection in connections.items():
            connection.send(number)
            taken, found[side], count[side] = connection.recv()
            if turn:
                seconds[side].append(taken)
            time.sleep(0.2)  # Until its worker threads sleep.
    print(f"\n{case.name}")
    for side, times in seconds.items():
        print(
            f"  {side:<14} median {np.median(times):7.3f} s   best {min(times):7.3f} s"
        )
    for side, aim in AIMS.items():
        if {side, "ours"} <= connections.keys():
            turns = np.array(seconds[side]) / np.array(seconds["ours"])
            verdict = "met" if np.median(turns) >= aim else "missed"
            sets = [sorted(a) == sorted(b) for a, b in zip(found[side], found["ours"])]
            print(
                f"  {side} / ours = {np.median(turns):.2f} (turns {turns.min():.2f} to "
                f"{turns.max():.2f}); aim at least {aim}: {verdict}; same "
                f"hypotheses: {np.mean(sets):.1%} of rows"
            )
    if "ours" in connections:
        print(f"  programs compiled so far: {count['ours']}", flush=True)


def main(
    setup: Setup,
    *,
    rounds: int = 7,
    only: str = "",
    sides: tuple[str, ...] = tuple(SIDES),
) -> None:
    """Speed of translation, ours against transformers and CTranslate2.

    Args:
        setup: the model and the cores.
        rounds: turns of each side, after one that warms up.
        only: just the cases whose name contains this text.
        sides: which sides to run.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.cores])
    packages = ("jax", "torch", "transformers", "ctranslate2")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{setup.cores} cores, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        save_model(setup, directory)
        connections = {
            side: stack.enter_context(started(side, setup, directory)) for side in sides
        }
        for number, case in enumerate(cases(setup)):
            if only in case.name:
                measure(case, number, connections, rounds)


if __name__ == "__main__":
    tyro.cli(main)
