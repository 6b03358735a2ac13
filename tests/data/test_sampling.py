"""Text that is cut into other subwords in every epoch: what is drawn, batched and resumed."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from qkv_jax.data import (
    PAD,
    BatchStream,
    Shape,
    SubwordSampler,
    encode_pairs,
    train_iterator,
    train_tokenizer,
)

WORDS = ["walking", "talked", "singing", "walks", "talking", "sings", "walked", "song"]
TAG = "<tag>"


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(3)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(120)]
    return [(f"{TAG} {line}", line.upper()) for line in lines]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, pairs, tmp_path_factory):
    return train_tokenizer(
        [side for pair in pairs for side in pair],
        vocab_size=300,
        model_type=request.param,
        symbols=[TAG],
        directory=tmp_path_factory.mktemp("tokenizers"),
    )


def make_stream(pairs, tokenizer, *, seed=0, **options):
    """Rows as long as the longest sentence usually is."""
    plain = encode_pairs(pairs, tokenizer)
    longest = int(max(side.lengths.max() for side in plain))
    return BatchStream(
        plain,
        [Shape(longest // 2, longest // 2), Shape(longest, longest)],
        target_tokens=4 * longest,
        rows_multiple=2,
        seed=seed,
        resample=SubwordSampler(pairs, tokenizer, 0.2, seed=seed, symbols=[TAG]),
        **options,
    )


def epoch_of(stream, epoch):
    return [stream.batch(epoch, i) for i in range(stream.batches(epoch))]


def texts(batches, side, tokenizer):
    """What the batches' sentences say, and how many there are of each."""
    found = Counter()
    for batch in batches:
        segments = batch.get(f"{side}_segments", (batch[side] != PAD).astype(int))
        for row, numbers in zip(batch[side], segments):
            found.update(
                tokenizer.decode(row[numbers == n].tolist() for n in set(numbers) - {0})
            )
    return found


def equal(first, second):
    return all(
        np.array_equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in a
    )


def test_a_draw_says_the_same_in_other_subwords_by_its_seed_alone(pairs, tokenizer):
    sources = [pair[1] for pair in pairs]
    plain = tokenizer.encode(sources)
    draws = [tokenizer.sample(sources, alpha=0.2, seed=seed) for seed in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1] != plain
    assert tokenizer.decode(draws[0]) == tokenizer.decode(draws[1]) == sources
    assert tokenizer.encode(sources) == plain
    assert sum(map(len, draws[0])) > sum(map(len, plain))


def test_the_best_of_few_segmentations_are_close_to_the_usual(pairs, tokenizer):
    sources = [pair[1] for pair in pairs]
    few, all_ = (
        tokenizer.sample(sources, alpha=0.1, nbest=nbest, seed=1) for nbest in (2, -1)
    )
    if few != all_:  # of a unigram model alone
        assert sum(map(len, few)) < sum(map(len, all_))


def test_tags_stand_whole_before_text_of_the_tokenizers_own_language(pairs, tokenizer):
    tag = tokenizer.encode([TAG])[0]
    tagged = SubwordSampler(pairs, tokenizer, 0.05, symbols=[TAG])(0)
    for index in range(len(pairs)):
        assert tagged.source[index][: len(tag)].tolist() == tag
    untagged = [(pair[1], pair[1]) for pair in pairs]
    drawn = SubwordSampler(untagged, tokenizer.tagged(TAG), 0.05)(0)
    for side, beginning in zip(drawn, (tag, [])):
        ids = [side[index].tolist() for index in range(len(pairs))]
        assert all(row[: len(beginning)] == beginning for row in ids)
        said = tokenizer.decode(row[len(beginning) :] for row in ids)
        assert said == [pair[1] for pair in pairs]


def test_epochs_are_drawn_by_seed_and_number_in_any_order(pairs, tokenizer):
    sampler = SubwordSampler(pairs, tokenizer, 0.2, seed=5)
    second, first = sampler(1), sampler(0)
    again = SubwordSampler(pairs, tokenizer, 0.2, seed=5)
    other = SubwordSampler(pairs, tokenizer, 0.2, seed=6)
    for side in range(2):
        np.testing.assert_array_equal(again(0)[side].tokens, first[side].tokens)
        np.testing.assert_array_equal(again(1)[side].tokens, second[side].tokens)
        assert first[side].tokens.tolist() != second[side].tokens.tolist()
        assert first[side].tokens.tolist() != other(0)[side].tokens.tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_holds_every_pair_in_the_same_few_shapes(pairs, tokenizer, packing):
    stream = make_stream(pairs, tokenizer, packing=packing)
    shapes = set()
    for epoch in (0, 1, 2):
        batches = epoch_of(stream, epoch)
        for place, side in enumerate(("source", "target")):
            said = Counter(pair[place] for pair in pairs)
            assert texts(batches, side, tokenizer) == said
        shapes |= {batch["target"].shape for batch in batches}
    assert len(shapes) <= (1 if packing else 2)
    assert not equal(epoch_of(stream, 0)[:1], epoch_of(stream, 1)[:1])
    with pytest.raises(TypeError, match="use batch"):
        stream[0]


@pytest.mark.parametrize("packing", [False, True])
def test_processes_draw_the_same_and_share_the_rows(pairs, tokenizer, packing):
    whole = make_stream(pairs, tokenizer, packing=packing)
    parts = [
        make_stream(pairs, tokenizer, packing=packing, share=(i, 2)) for i in (0, 1)
    ]
    for batch, *shares in zip(
        *(epoch_of(stream, 1) for stream in (whole, *parts)), strict=True
    ):
        for name, rows in batch.items():
            together = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(together, rows)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_position_continues_with_the_same_batches(
    pairs, tokenizer, prefetch
):
    def iterator():
        stream = make_stream(pairs, tokenizer, packing=True)
        return train_iterator(stream, prefetch=prefetch), stream.batches(0)

    straight, first = iterator()
    batches = [next(straight) for _ in range(first + 6)]
    for taken in (0, 1, first - 1, first, first + 2):
        run, _ = iterator()
        assert equal([next(run) for _ in range(taken)], batches[:taken])
        state = json.loads(json.dumps(run.get_state()))
        again, _ = iterator()
        next(again)
        again.set_state(state)
        assert equal([next(again) for _ in range(3)], batches[taken : taken + 3])
