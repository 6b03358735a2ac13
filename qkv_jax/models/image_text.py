"""Pictures and captions: one encoder of each, contrasted, and a captioner by gated cross-attention.

As in CoCa (Yu et al. 2022, arXiv 2205.01917) the text encoder is causal: its state at a caption's
end is what is compared with the picture, and its states before go on to the captioner, whose layers
attend to the picture's patches through gates (Flamingo: Alayrac et al. 2022, arXiv 2204.14198).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.decoding import greedy_search
from qkv_jax.layers import (
    AddPositions,
    Embedding,
    EncoderBlock,
    FeedForward,
    MultiHeadAttention,
    Remat,
    check_remat,
    make_norm,
    pairs_of_keys,
    run_blocks,
)
from qkv_jax.models.detection import normalise
from qkv_jax.models.pyramid import Conv, ConvNet, grid_sinusoids
from qkv_jax.ops import Ancestry, KVCache, Mask, dropout, masks, split_rng
from qkv_jax.ops.images import Augmentation, augment

Array = jax.Array
Batch = dict[str, Array]
PAD, EOS = 0, 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and losses.

    Attributes:
        vocabulary: V, the languages' tags included; 0: taken from the data.
        longest: T, tokens of a caption; 0: taken from the data.
        widths: channels of the convolutions, the last of which makes the patches.
        blocks: residual blocks of each.
        d_model: D.
        heads: N.
        d_ff: F.
        image_layers: of attention over the patches.
        text_layers: of causal attention over the caption.
        caption_layers: of gated cross-attention to the patches, and causal attention.
        gate: what the gates start from: tanh(gate) is the weight of what comes from the picture.
        width: of the space in which pictures and captions are compared.
        temperature: that cosines are divided by at first; it is learnt.
        smoothing: of labels, in the comparison and in captions.
        caption_weight: of the captions' loss, beside the comparison's.
        dropout: of all layers of attention.
        augmentation: of training pictures; None: none.
        remat, scan_layers: what training keeps of each layer for its backward pass, and whether the
            layers of each kind are one loop, see `run_blocks`.
    """

    vocabulary: int = 0
    longest: int = 0
    widths: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (0, 1, 2)
    d_model: int = 128
    heads: int = 4
    d_ff: int = 256
    image_layers: int = 2
    text_layers: int = 2
    caption_layers: int = 2
    gate: float = 0.5
    width: int = 128
    temperature: float = 0.1
    smoothing: float = 0.1
    caption_weight: float = 0.5
    dropout: float = 0.1
    augmentation: Augmentation | None = field(
        default_factory=functools.partial(
            Augmentation,
            flip="",
            scale=(0.85, 1.15),
            shift=0.08,
            contrast=0.15,
            colour=0.05,
        )
    )
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self):
        check_remat(self.remat)
        if self.d_model % self.heads or self.d_model % 4:
            raise ValueError(
                f"heads and 4 must divide d_model; got {self.heads} and {self.d_model}."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {self.smoothing}.")


class GatedCross(nnx.Module):
    """x + tanh(a) cross(x, patches), then x + tanh(b) feed-forward(x); a and b are learnt.

    Source: Alayrac et al. 2022, arXiv 2204.14198, figure 4.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D = config.d_model
        self.norms = nnx.List(
            make_norm(D, "layer", 1e-5, jnp.float32, rngs) for _ in range(2)
        )
        self.cross = MultiHeadAttention(D, config.heads, rngs=rngs)
        self.feed_forward = FeedForward(D, config.d_ff, activation="gelu", rngs=rngs)
        self.gates = nnx.Param(jnp.full((2,), config.gate), axes=(None,))
        self.dropout_rate = config.dropout

    def __call__(
        self, x: Array, remembered: KVCache, *, rng: Array | None = None
    ) -> Array:
        """x (B, T, D) and the patches' keys and values -> (B, T, D)."""
        rngs, gates = split_rng(rng, 2), jnp.tanh(self.gates[...])
        y = self.cross.attend(self.norms[0](x), remembered)
        x = x + gates[0] * dropout(y, self.dropout_rate, rngs[0])
        y = self.feed_forward(self.norms[1](x))
        return x + gates[1] * dropout(y, self.dropout_rate, rngs[1])


class Model(nnx.Module):
    """Pictures (B, H, W, 3) and captions (B, T), compared and told from each other."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        for name in ("vocabulary", "longest"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"{name} must be positive; got {getattr(config, name)}."
                )
        D = config.d_model
        self.config = config
        self.net = ConvNet(config.widths, config.blocks, groups=8, rngs=rngs)
        self.patch = Conv(config.widths[-1], D, size=1, rngs=rngs)
        self.image_blocks = _blocks(config, config.image_layers, rngs)
        self.embedding = Embedding(config.vocabulary, D, zero=PAD, rngs=rngs)
        self.positions = AddPositions(
            D, positions="learned", longest=config.longest, rngs=rngs
        )
        self.text_blocks = _blocks(config, config.text_layers, rngs)
        self.crosses = nnx.List(
            GatedCross(config, rngs=rngs) for _ in range(config.caption_layers)
        )
        self.caption_blocks = _blocks(config, config.caption_layers, rngs)
        self.norms = nnx.List(
            make_norm(D, "layer", 1e-5, jnp.float32, rngs) for _ in range(3)
        )
        self.to_image, self.to_text = (_space(config, rngs) for _ in range(2))
        self.scale = nnx.Param(
            -jnp.log(jnp.full((1,), config.temperature)), axes=(None,)
        )

    def patches(self, pixels: Array, *, rng: Array | None = None) -> Array:
        """pixels (B, H, W, 3) about 0 -> (B, P, D)."""
        x = self.patch(self.net(pixels)[-1])
        B, h, w, D = x.shape
        x = (x + grid_sinusoids(h, w, D)[None]).reshape(B, h * w, D)
        rngs = split_rng(rng, len(self.image_blocks))
        x = self._run(self.image_blocks, x, rngs, None)
        return self.norms[0](x)

    def read(self, tokens: Array, *, rng: Array | None = None) -> Array:
        """Captions (B, T) -> states (B, T, D), each of what stands up to there."""
        rngs = split_rng(rng, len(self.text_blocks))
        x = self._embed(tokens, jnp.arange(tokens.shape[1])[None])
        return self._run(self.text_blocks, x, rngs, masks.causal())

    def image_vectors(self, patches: Array) -> Array:
        """Patches (B, P, D) -> vectors of length 1, (B, W)."""
        return _unit(self.to_image(patches.mean(axis=1)))

    def text_vectors(self, states: Array, tokens: Array) -> Array:
        """A caption's states (B, T, D), of which that at its end counts -> (B, W) of length 1."""
        end = jnp.sum(tokens != PAD, axis=1) - 1
        last = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return _unit(self.to_text(self.norms[1](last)))

    def caption_logits(
        self, states: Array, patches: Array, *, rng: Array | None = None
    ) -> Array:
        """States (B, L, T, D) of L captions of a picture each, patches (B, P, D) -> (B, L, T, V)."""
        B, L, T, D = states.shape

        def layer(
            parts: tuple[GatedCross, EncoderBlock], x: Array, drawn: Array | None
        ) -> Array:
            (cross, block), rngs = parts, (None, None) if drawn is None else drawn
            # Captions of a picture ask at once: its keys and values are made once for all.
            x = cross(
                x.reshape(B, L * T, D), cross.cross.remember(patches), rng=rngs[0]
            )
            x = x.reshape(B * L, T, D)
            return block(x, mask=masks.causal(), rng=rngs[1])

        x = run_blocks(
            list(zip(self.crosses, self.caption_blocks)),
            states.reshape(B * L, T, D),
            pairs_of_keys(split_rng(rng, 2 * len(self.crosses))),
            layer,
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )
        return self._logits(x).reshape(B, L, T, -1)

    def loss(self, batch: Batch, *, rng: Array | None) -> tuple[Array, dict]:
        """The comparison's and the captions' losses, summed over rows.

        In training each row shows one of its styles, at random; else all are shown, and the sums
        are means over them. A row is compared with all rows of the batch.

        Args:
            batch: image (B, S, H, W, 3) uint8, tokens (B, L, T) int32, weight (B,).
            rng: draws styles, augmentation and dropout; None: neither.
        """
        rngs, weight, tokens = split_rng(rng, 5), batch["weight"], batch["tokens"]
        images = batch["image"]
        if rngs[0] is not None:
            drawn = jax.random.randint(rngs[0], (len(weight),), 0, images.shape[1])
            images = jnp.take_along_axis(images, drawn.reshape(-1, 1, 1, 1, 1), axis=1)
        (B, S), (_, L, T) = images.shape[:2], tokens.shape
        pixels = normalise(images.reshape(B * S, *images.shape[2:]))
        if rngs[1] is not None and self.config.augmentation is not None:
            pixels = augment(pixels / 4 + 0.5, self.config.augmentation, rngs[1])[0]
            pixels = (pixels - 0.5) * 4
        patches = self.patches(pixels, rng=rngs[2])
        flat = tokens.reshape(B * L, T)
        states = self.read(flat, rng=rngs[3])
        texts = self.text_vectors(states, flat).reshape(B, L, -1)
        seen = self.image_vectors(patches).reshape(B, S, -1)
        compared = self._compare(seen, texts, weight)
        shown = jnp.repeat(states.reshape(B, 1, L, T, -1), S, axis=1)
        logits = self.caption_logits(
            shown.reshape(B * S, L, T, -1)[:, :, :-1], patches, rng=rngs[4]
        )
        nll, right = self._told(logits, jnp.repeat(tokens, S, axis=0)[:, :, 1:])
        nll, right = (x.reshape(B, S).mean(axis=1) for x in (nll, right))
        total = compared + self.config.caption_weight * nll
        sums = {
            "loss_sum": jnp.sum(total * weight),
            "compare_sum": jnp.sum(compared * weight),
            "caption_sum": jnp.sum(nll * weight),
            "accuracy_sum": jnp.sum(right * weight),
            "tokens": jnp.sum(weight),
        }
        return sums["loss_sum"], sums

    def predict(self, batch: Batch) -> dict[str, Array]:
        """image (B, S, W) and text (B, L, W) vectors, and the likeliest captions (B, S, L, T)."""
        images, tokens = batch["image"], batch["tokens"]
        (B, S), (_, L, T) = images.shape[:2], tokens.shape
        patches = self.patches(normalise(images.reshape(B * S, *images.shape[2:])))
        flat = tokens.reshape(B * L, T)
        texts = self.text_vectors(self.read(flat), flat).reshape(B, L, -1)
        starts = jnp.repeat(tokens[:, :, 0], S, axis=0)
        return {
            "image": self.image_vectors(patches).reshape(B, S, -1),
            "text": texts,
            "captions": self.describe(patches, starts, T).reshape(B, S, L, T),
        }

    def describe(self, patches: Array, starts: Array, steps: int) -> Array:
        """Captions of pictures, each token the likeliest after those before: (B, L, steps) int32.

        Args:
            patches: (B, P, D).
            starts: (B, L) int32, the tag of the language of each caption.
            steps: T; a caption holds its tag, and PAD after EOS.
        """
        (B, L), D = starts.shape, patches.shape[-1]
        remembered = [cross.cross.remember(patches) for cross in self.crosses]
        heads = self.config.heads
        blocks = [*self.text_blocks, *self.caption_blocks]
        caches = [
            KVCache.zeros(B * L, steps, heads, D // heads, patches.dtype)
            for _ in blocks
        ]
        first = starts.reshape(B * L, 1)

        def step(token: Array, cache: Any) -> tuple[Array, Any]:
            caches, ancestry = cache
            # Each caption begins with its own tag.
            token = jnp.where(ancestry.step == 0, first, token)
            x = self._embed(token, ancestry.step[None, None])
            kept, count = [], len(self.text_blocks)
            for i, (block, layer) in enumerate(zip(blocks, caches)):
                if i >= count:
                    asked = x.reshape(B, L, D)
                    x = self.crosses[i - count](asked, remembered[i - count])
                    x = x.reshape(B * L, 1, D)
                x, layer = _step(block, x, layer, ancestry)
                kept.append(layer)
            return self._logits(x), (kept, ancestry.advance())

        found = greedy_search(
            step,
            (caches, Ancestry.start(B * L, 1, steps)),
            batch_size=B * L,
            bos=EOS,
            eos=EOS,
            pad=PAD,
            max_length=steps - 1,
            end_at_limit=False,
        )
        captions = jnp.concatenate([first, found.tokens[:, 0]], axis=1)
        return captions.reshape(B, L, steps)

    def _compare(self, images: Array, texts: Array, weight: Array) -> Array:
        """Cross-entropy of finding each other among the batch's rows, both ways: (B,)."""
        cosines = jnp.einsum("BSW,CLW->SLBC", images, texts)
        logits = cosines * jnp.exp(jnp.minimum(self.scale[...], 4.6)).reshape(
            1, 1, 1, 1
        )
        own = jnp.eye(weight.shape[0], dtype=bool)[None, None]
        absent = jnp.where(weight > 0, 0.0, -1e9).reshape(1, 1, 1, -1)
        smoothing = self.config.smoothing
        total = jnp.zeros_like(logits[..., 0])
        for found in (logits, logits.swapaxes(2, 3)):
            odds = jax.nn.log_softmax(found + absent, axis=-1)
            picked = jnp.sum(jnp.where(own, odds, 0.0), axis=-1)
            present = jnp.where(absent < 0, 0.0, odds).sum(axis=-1)
            even = present / jnp.maximum(weight.sum(), 1.0)
            total = total - (1 - smoothing) * picked - smoothing * even
        return total.mean(axis=(0, 1)) / 2

    def _told(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Mean cross-entropy and accuracy of captions' tokens: (B,) each."""
        odds = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(odds, labels[..., None], axis=-1)[..., 0]
        smoothing = self.config.smoothing
        nll = -(1 - smoothing) * picked - smoothing * odds.mean(axis=-1)
        real = (labels != PAD).astype(jnp.float32)
        right = (logits.argmax(axis=-1) == labels) * real
        count = jnp.maximum(real.sum(axis=(1, 2)), 1.0)
        return (nll * real).sum(axis=(1, 2)) / count, right.sum(axis=(1, 2)) / count

    def _run(
        self,
        blocks: nnx.List,
        x: Array,
        rngs: Sequence[Array | None],
        mask: Mask | None,
    ) -> Array:
        return run_blocks(
            blocks,
            x,
            rngs,
            lambda block, x, drawn: block(x, mask=mask, rng=drawn),
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )

    def _embed(self, tokens: Array, places: Array) -> Array:
        return self.positions(self.embedding(tokens), places)

    def _logits(self, x: Array) -> Array:
        return self.embedding.logits(self.norms[2](x))


def _blocks(config: Config, count: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List(
        EncoderBlock(
            config.d_model,
            attention={"heads": config.heads},
            feed_forward={"d_ff": config.d_ff, "activation": "gelu"},
            residual={
                "place": "pre",
                "dropout_rate": config.dropout,
                "dtype": jnp.float32,
            },
            rngs=rngs,
        )
        for _ in range(count)
    )


def _step(
    block: EncoderBlock, x: Array, cache: KVCache, ancestry: Ancestry
) -> tuple[Array, KVCache]:
    """One position of a causal block: x (B, 1, D)."""
    written = {}

    def attend(y: Array) -> Array:
        out, written["cache"] = block.attention.step(y, cache, ancestry)
        return out

    x = block.after_attention(x, attend)
    return block.after_feed_forward(x, block.feed_forward), written["cache"]


def _space(config: Config, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.d_model,
        config.width,
        use_bias=False,
        kernel_metadata={"axes": ("embed", None)},
        rngs=rngs,
    )


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
