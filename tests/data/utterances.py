"""Small files of the forms that the readers of speech take."""

import numpy as np

WORDS = ("ONE", "TWO", "A", "B")


def write_an4(directory, *, speakers=4, seed=0, **changes):
    """an4_train.npz of three utterances a speaker, and an4_test.npz of two others'."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, people in (("train", range(speakers)), ("test", range(90, 92))):
        texts, frames, ids = [], [], []
        for person in people:
            for i in range(3):
                said = rng.choice(WORDS, size=1 + i)
                texts.append(" ".join(said))
                frames.append(_frames(said, rng))
                ids.append(f"an4_clstk/p{person}/an{i}-p{person}-b")
        arrays = {
            "mfcc": np.concatenate(frames),
            "offsets": np.cumsum([0, *map(len, frames)]),
            "text": np.array(texts),
            "ids": np.array(ids),
        }
        np.savez(directory / f"an4_{part}.npz", **(arrays | changes))
    return directory


def _frames(said, rng):
    """Six frames a word, which tell the words apart, and two of silence."""
    centres = np.random.default_rng(1).normal(size=(len(WORDS), 1, 13))
    sounds = centres * (np.arange(8) < 6)[:, None]
    frames = np.concatenate([sounds[WORDS.index(word)] for word in said])
    return (frames + 0.1 * rng.normal(size=frames.shape)).astype(np.float32)


def write_fsdd(file, *, recordings=4, **changes):
    """Three speakers who say each digit a few times: tones."""
    names = np.array(["ann", "bob", "eve"])
    clips, label, speaker, index = [], [], [], []
    for who in range(3):
        for digit in range(10):
            for i in range(recordings):
                samples = np.arange(300 + 20 * i)
                tone = np.sin(samples * 0.2 * (1 + digit) * (1 + 0.05 * who))
                clips.append((tone * 9_000).astype(np.int16))
                label.append(digit)
                speaker.append(who)
                index.append(i + 3)
    arrays = {
        "audio": np.concatenate(clips),
        "offsets": np.cumsum([0, *map(len, clips)]),
        "label": np.array(label, np.int8),
        "speaker": np.array(speaker, np.int8),
        "index": np.array(index, np.int16),
        "speaker_names": names,
        "sample_rate": np.array(8_000),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **(arrays | changes))
    return file
