"""Frames of sound on the device: normalised, and changed at random so that models generalise.

Everywhere x is (B, T, C), a row's frames and then whatever fills it up, and lengths (B,) int32.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the frames in training; the zeros do nothing.

    Attributes:
        tempo: each utterance is made up to this share shorter or longer.
        warp: bands are drawn together or apart by up to this share, about band 0.
        shift: bands are moved by up to so many, as by a longer or shorter vocal tract.
        time_masks, time_width: runs of frames that are blanked, and how long they are at most, as a
            share of the utterance.
        band_masks, band_width: runs of bands that are blanked, and how many bands at most.
        noise: standard deviation of what is added, where the features' is 1.

    Source: time and band masks are SpecAugment, Park et al. 2019, arXiv 1904.08779, 2.
    """

    tempo: float = 0.0
    warp: float = 0.0
    shift: float = 0.0
    time_masks: int = 0
    time_width: float = 0.1
    band_masks: int = 0
    band_width: int = 8
    noise: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"{field.name} must not be negative; got {getattr(self, field.name)}."
                )
        for name in ("tempo", "warp", "time_width"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1; got {getattr(self, name)}.")


def prepare(
    x: Array,
    lengths: Array,
    *,
    cepstra: int = 0,
    augmentation: Augmentation | None = None,
    rng: Array | None = None,
) -> tuple[Array, Array]:
    """Features of mean 0 and deviation 1 over each utterance, 0 beyond it; and their lengths.

    Args:
        x: (B, T, C) log-mel energies or cepstra.
        lengths: (B,).
        cepstra: how many the bands are turned into, after they were changed; 0: they stay.
        augmentation: what is done in training; needs bands for all that moves or masks them.
        rng: draws what is done; None: nothing is.

    Returns:
        (B, T, C or cepstra) float32 and (B,) int32.
    """
    if augmentation is None or rng is None:
        x = _centred(x, lengths)
        x = to_cepstra(x, cepstra) if cepstra else x
        return normalise(x, lengths), lengths
    tempo, scale, shift, masks, noise = jax.random.split(rng, 5)
    x, lengths = stretch(x, lengths, _uniform(tempo, lengths, augmentation.tempo))
    x = warp(
        x,
        1.0 + _uniform(scale, lengths, augmentation.warp),
        _uniform(shift, lengths, augmentation.shift),
    )
    x = mask_runs(_centred(x, lengths), lengths, augmentation, masks)
    x = normalise(to_cepstra(x, cepstra) if cepstra else x, lengths)
    if augmentation.noise:
        noisy = x + augmentation.noise * jax.random.normal(noise, x.shape)
        x = jnp.where(_valid(x, lengths), noisy, 0.0)
    return x, lengths


def normalise(x: Array, lengths: Array) -> Array:
    """Each channel of each utterance to mean 0 and deviation 1 over its frames; 0 beyond them."""
    x = _centred(x, lengths)
    frames = jnp.maximum(lengths, 1)[:, None, None]
    variance = jnp.sum(x * x, axis=1, keepdims=True) / frames
    return x * jax.lax.rsqrt(variance + 1e-5)


def stretch(x: Array, lengths: Array, longer: Array) -> tuple[Array, Array]:
    """Each utterance's frames interpolated to 1 + longer (B,) as many, T at most."""
    T = x.shape[1]
    new = jnp.clip(jnp.round(lengths * (1.0 + longer)), 1, T).astype(jnp.int32)
    step = (lengths - 1) / jnp.maximum(new - 1, 1)
    places = jnp.arange(T, dtype=jnp.float32)[None] * step[:, None]
    places = jnp.clip(places, 0.0, jnp.maximum(lengths - 1, 0)[:, None])
    before = jnp.floor(places).astype(jnp.int32)
    after = jnp.minimum(before + 1, T - 1)
    share = (places - before)[..., None]
    rows = jnp.arange(x.shape[0])[:, None]
    return x[rows, before] * (1.0 - share) + x[rows, after] * share, new


def warp(x: Array, scale: Array, shift: Array) -> Array:
    """Band j of a row becomes what was between bands at scale * j + shift; both (B,)."""
    C = x.shape[2]
    bands = jnp.arange(C, dtype=jnp.float32)
    places = scale[:, None] * bands[None] + shift[:, None]
    places = jnp.clip(places, 0.0, C - 1.0)
    near = jnp.abs(places[:, None, :] - bands[None, :, None])
    weights = jnp.maximum(1.0 - near, 0.0)
    return jnp.einsum("BTC,BCE->BTE", x, weights)


def mask_runs(x: Array, lengths: Array, changes: Augmentation, rng: Array) -> Array:
    """Runs of frames and of bands set to 0, drawn anew for each utterance."""
    B, T, C = x.shape
    time_rng, band_rng = jax.random.split(rng)
    frames = lengths.astype(jnp.float32)[:, None]
    hidden = _runs(time_rng, changes.time_masks, T, frames, changes.time_width * frames)
    kept = ~hidden[:, :, None]
    bands = jnp.full((B, 1), C, jnp.float32)
    widest = jnp.full((B, 1), changes.band_width, jnp.float32)
    hidden = _runs(band_rng, changes.band_masks, C, bands, widest)
    return jnp.where(kept & ~hidden[:, None, :], x, 0.0)


def to_cepstra(x: Array, count: int) -> Array:
    """The first `count` coefficients of the orthonormal cosine transform of the bands."""
    C = x.shape[2]
    orders = jnp.arange(count, dtype=jnp.float32)[None]
    bands = jnp.arange(C, dtype=jnp.float32)[:, None]
    heights = jnp.where(orders == 0, (1.0 / C) ** 0.5, (2.0 / C) ** 0.5)
    basis = heights * jnp.cos(jnp.pi * orders * (bands + 0.5) / C)
    return jnp.einsum("BTC,CE->BTE", x, basis)


def _runs(rng: Array, count: int, size: int, length: Array, widest: Array) -> Array:
    """(B, size) bool: inside one of `count` runs that begin within `length` (B, 1)."""
    starts, widths = jax.random.uniform(rng, (2, length.shape[0], count))
    widths = widths * widest
    starts = starts * jnp.maximum(length - widths, 0.0)
    place = jnp.arange(size, dtype=jnp.float32)[None, None]
    inside = (starts[..., None] <= place) & (place < (starts + widths)[..., None])
    return inside.any(axis=1)


def _uniform(rng: Array, like: Array, most: float) -> Array:
    """(B,) numbers from -most to most."""
    return jax.random.uniform(rng, like.shape, minval=-most, maxval=most)


def _valid(x: Array, lengths: Array) -> Array:
    return jnp.arange(x.shape[1])[None, :, None] < lengths[:, None, None]


def _centred(x: Array, lengths: Array) -> Array:
    """Each channel less its mean over the utterance; 0 beyond it."""
    valid = _valid(x, lengths)
    frames = jnp.maximum(lengths, 1)[:, None, None]
    mean = jnp.sum(jnp.where(valid, x, 0.0), axis=1, keepdims=True) / frames
    return jnp.where(valid, x - mean, 0.0)
