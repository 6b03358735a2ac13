"""Log-mel energies against a slow direct definition; resampling and cepstra against their inverses."""

import math

import numpy as np
import pytest

from qkv_jax.data.audio import log_mel, mel_bands, mel_of_cepstra, resample

RATE = 500


def slow_log_mel(x, rate, filters, window, hop, low, high):
    """The definition, a sum at a time: no transform, no windows of numpy's."""
    size, step = round(window * rate), round(hop * rate)
    x = [x[0]] + [x[i] - 0.97 * x[i - 1] for i in range(1, len(x))]
    points = 1
    while points < size:
        points *= 2

    def mel(hertz):
        return 2595 * math.log10(1 + hertz / 700)

    edges = [
        mel(low) + (mel(high) - mel(low)) * i / (filters + 1)
        for i in range(filters + 2)
    ]
    edges = [700 * (10 ** (edge / 2595) - 1) for edge in edges]
    rows = []
    for start in range(0, len(x) - size + 1, step):
        frame = [
            x[start + n] * (0.5 - 0.5 * math.cos(2 * math.pi * n / size))
            for n in range(size)
        ]
        energies = [0.0] * filters
        for k in range(points // 2 + 1):
            angle = -2 * math.pi * k / points
            power = (
                sum(v * math.cos(angle * n) for n, v in enumerate(frame)) ** 2
                + sum(v * math.sin(angle * n) for n, v in enumerate(frame)) ** 2
            )
            hertz = k * rate / points
            for j in range(filters):
                left, centre, right = edges[j : j + 3]
                if left <= hertz <= centre:
                    energies[j] += power * (hertz - left) / (centre - left)
                elif centre < hertz <= right:
                    energies[j] += power * (right - hertz) / (right - centre)
        rows.append([math.log(max(energy, 1e-10)) for energy in energies])
    return np.array(rows)


def test_log_mel_is_its_definition():
    x = np.random.default_rng(0).normal(size=61)
    settings = {"filters": 5, "window": 0.026, "hop": 0.01, "low": 20.0, "high": 240.0}
    got = log_mel(x, RATE, **settings)
    assert got.shape == (10, 5) and got.dtype == np.float32
    np.testing.assert_allclose(
        got, slow_log_mel(x, RATE, **settings), rtol=1e-5, atol=1e-5
    )


def test_a_tone_is_loudest_in_its_band_and_silence_is_finite():
    x = np.sin(2 * np.pi * 1_000 * np.arange(4_000) / 8_000)
    loudest = log_mel(x, 8_000, filters=20).mean(0).argmax()
    weights = mel_bands(8_000, 256, filters=20, low=20.0)
    assert weights[:, 32].argmax() == loudest
    assert np.isfinite(log_mel(np.zeros(4_000), 8_000)).all()


def test_a_sound_shorter_than_a_window_is_one_frame():
    assert log_mel(np.ones(7), 8_000, filters=8).shape == (1, 8)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="one channel"):
        log_mel(np.zeros((5, 2)), RATE)
    with pytest.raises(ValueError, match="hop must be"):
        log_mel(np.zeros(500), RATE, hop=0.05)
    with pytest.raises(ValueError, match="low and high"):
        log_mel(np.zeros(500), RATE, high=251.0)
    with pytest.raises(ValueError, match="speed must be positive"):
        resample(np.zeros(5), 0.0)
    with pytest.raises(ValueError, match="at least the 13 cepstra"):
        mel_of_cepstra(np.zeros((4, 13)), 12)


def test_a_tone_played_faster_is_higher_and_shorter():
    cycles = np.arange(400) / 400
    faster = resample(np.sin(2 * np.pi * 20 * cycles), 1.25)
    assert len(faster) == 320
    expected = np.sin(2 * np.pi * 20 * np.arange(320) / 320)
    np.testing.assert_allclose(faster, expected, atol=1e-9)
    np.testing.assert_allclose(resample(cycles, 1.0), cycles, atol=1e-9)


def test_bands_made_of_cepstra_have_these_cepstra():
    cepstra = np.random.default_rng(0).normal(size=(3, 13))
    bands = mel_of_cepstra(cepstra, 40)
    angles = np.pi * np.arange(13)[:, None] * (np.arange(40) + 0.5) / 40
    np.testing.assert_allclose(bands @ np.cos(angles).T / 40, cepstra, atol=1e-5)
