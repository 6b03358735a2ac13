"""Sound to features of its frames: log-mel energies from waveforms, and from cepstra; resampling."""

import math

import numpy as np

_FLOOR = 1e-10  # An energy of silence: its logarithm is finite.


def log_mel(
    waveform: np.ndarray,
    rate: int,
    *,
    filters: int = 40,
    window: float = 0.025,
    hop: float = 0.010,
    low: float = 20.0,
    high: float | None = None,
    preemphasis: float = 0.97,
) -> np.ndarray:
    """Logarithms of the energies in mel-spaced triangular bands, a row every `hop` seconds.

    The frames lie within the sound; one shorter than a window is filled up with silence.

    Args:
        waveform: (samples,) real, such as int16 / 32,768.
        rate: samples a second.
        filters: C, bands.
        window, hop: seconds, of a Hann window and between the starts of two.
        low, high: hertz, where the first band begins and the last ends; high None: rate / 2.
        preemphasis: each sample less this times the one before.

    Returns:
        (T, C) float32, T = 1 + (samples - window) // hop; natural logarithms.

    Raises:
        ValueError: the waveform is not one channel, or a setting is out of range.

    Source: Davis and Mermelstein 1980; mel scale and bands as in HTK (Young et al., The HTK
    book, 5.4): mel = 2595 log10(1 + hertz / 700), bands of height 1.
    """
    if waveform.ndim != 1:
        raise ValueError(
            f"waveform must be (samples,), one channel; got shape {waveform.shape}."
        )
    size, step = round(window * rate), round(hop * rate)
    if not 0 < step <= size:
        raise ValueError(
            f"hop must be in (0, window], a sample at least; got {hop} and {window}."
        )
    x = np.asarray(waveform, np.float64)
    x = np.append(x[:1], x[1:] - preemphasis * x[:-1])
    x = np.pad(x, (0, max(size - len(x), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::step]
    points = 1 << (size - 1).bit_length()
    spectra = np.fft.rfft(frames * np.hanning(size + 1)[:-1], points)
    bands = mel_bands(rate, points, filters=filters, low=low, high=high)
    energies = (np.abs(spectra) ** 2) @ bands.T
    return np.log(np.maximum(energies, _FLOOR)).astype(np.float32)


def mel_bands(
    rate: int,
    points: int,
    *,
    filters: int,
    low: float = 0.0,
    high: float | None = None,
) -> np.ndarray:
    """Weights (C, points // 2 + 1) of the frequencies of a transform of `points` in each band."""
    high = rate / 2 if high is None else high
    if not 0 <= low < high <= rate / 2:
        raise ValueError(
            f"low and high must be rising, at most rate / 2 = {rate / 2}; got {low} and {high}."
        )
    mel = np.linspace(_mel(low), _mel(high), filters + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.arange(points // 2 + 1) * rate / points
    left, centre, right = (
        edges[i : i + filters, None] for i in range(3)
    )  # Each of (C, 1).
    rises, falls = (hertz - left) / (centre - left), (right - hertz) / (right - centre)
    return np.maximum(np.minimum(rises, falls), 0.0)


def mel_of_cepstra(cepstra: np.ndarray, filters: int = 40) -> np.ndarray:
    """Log-mel energies (..., C), as smooth as so few cepstra make them; cepstra (..., coefficients).

    Bands can be masked and moved, cepstra cannot. The cepstra are those of Sphinx:
    c[i] = sum over j of m[j] cos(pi i (j + 1/2) / C) / C, with m[0] halved; that is undone but for
    the halving, which moves each band by the same small number.

    Raises:
        ValueError: there are more cepstra than bands.
    """
    count = cepstra.shape[-1]
    if count > filters:
        raise ValueError(
            f"filters must be at least the {count} cepstra; got {filters}."
        )
    angles = np.pi * np.arange(count)[:, None] * (np.arange(filters) + 0.5) / filters
    basis = np.cos(angles) * np.where(np.arange(count) == 0, 1.0, 2.0)[:, None]
    return (cepstra @ basis).astype(np.float32)


def resample(waveform: np.ndarray, speed: float) -> np.ndarray:
    """The sound played `speed` times as fast, its pitch and resonances as many times as high.

    Args:
        waveform: (samples,) real.
        speed: positive; 1.1 makes it shorter.

    Returns:
        (round(samples / speed),) float64, band-limited: by Fourier transform of the whole.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed must be positive; got {speed}.")
    samples = max(round(len(waveform) / speed), 1)
    spectrum = np.fft.rfft(np.asarray(waveform, np.float64))
    bins = samples // 2 + 1
    spectrum = np.pad(spectrum[:bins], (0, max(bins - len(spectrum), 0)))
    return np.fft.irfft(spectrum, samples) * (samples / len(waveform))


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)
