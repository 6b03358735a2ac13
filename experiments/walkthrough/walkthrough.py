# %% [markdown]
# # Attention, from four words to a photograph
#
# Attention lets every element of a set (a word, a patch of an image) gather what it needs from the
# others. This page goes from the formula, by hand, to one function call that serves a sentence and a
# photograph alike, and draws the weights at every step. It runs in about half a minute:
#
#     python experiments/walkthrough/walkthrough.py
#
# $$\operatorname{attention}(Q, K, V) = \operatorname{softmax}\!\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$
#
# - A **query** (a row of $Q$) asks: *what am I looking for?*
# - A **key** (a row of $K$) is what the query is matched against: *what do I have to offer?*
# - A **value** (a row of $V$) is the content that is handed over. Values are **not** weights: the
#   weights are what the softmax makes of queries and keys, and they are made anew for every input.
#
# Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from qkv_jax.layers import QKVAttention
from qkv_jax.ops import attention_weights, dot_product_attention

OUT = (
    Path(sys.argv[1]) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
)
np.set_printoptions(precision=2, suppress=True)


def show(name, *panels, columns=None):
    """Draws arrays (title, array, row labels, column labels), and saves or shows the picture."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 3.2 * rows),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, array, down, across) in zip(grid.flat, panels):
        axes.set_title(title, fontsize=10)
        if down is None:
            axes.imshow(array)
            axes.axis("off")
            continue
        axes.imshow(array, cmap="viridis", vmin=min(0.0, array.min()), aspect="auto")
        axes.set_xticks(range(array.shape[1]), across, rotation=60, fontsize=8)
        axes.set_yticks(range(array.shape[0]), down, fontsize=8)
        if array.size <= 36:
            for (i, j), value in np.ndenumerate(array):
                ink = "white" if value < 0.6 * array.max() else "black"
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=8,
                )
    if OUT is not None:
        OUT.mkdir(parents=True, exist_ok=True)
        figure.savefig(OUT / f"{name}.png", dpi=110)
    plt.show()
    plt.close(figure)


# %% [markdown]
# ## 1. By hand: four words
#
# Each word is a vector of three numbers that we choose so that they can be read: how much it is an
# *animal*, an *action*, a *place*. Every word asks for what it lacks: its query is not its key.

# %%
words = ["the", "cat", "sat", "mat"]
parts = ["animal", "action", "place"]
key = np.array([[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]], float)  # what each offers
query = np.array(
    [[0, 0, 0], [0, 2, 0], [2, 0, 2], [0, 1, 0]], float
)  # what each looks for
value = np.array(
    [[0.1, 0.1, 0.1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
)  # what each hands over

scores = query @ key.T  # a number for each pair: query (row) against key (column)
scaled = scores / np.sqrt(key.shape[-1])
weights = np.exp(scaled) / np.exp(scaled).sum(
    axis=-1, keepdims=True
)  # softmax over the KEYS
output = weights @ value
print("weights\n", weights, "\nof each word (row) sum to", weights.sum(axis=-1))
print("output\n", output)
show(
    "1_by_hand",
    ("Q K^T", scores, words, words),
    ("softmax(Q K^T / sqrt(d_k))", weights, words, words),
    ("output = weights V", output, words, parts),
)

# %% [markdown]
# "sat" looks for an animal and a place, and so hands over its attention to "cat" and "mat" equally;
# "the" looks for nothing in particular, and gets the mean of all values.
#
# ## 2. The same by the library
#
# `dot_product_attention` takes batches and heads: (batch, length, heads, size).

# %%
as_heads = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (query, key, value)]
by_library = dot_product_attention(*as_heads)[0, :, 0]
np.testing.assert_allclose(by_library, output, atol=1e-5)
print("dot_product_attention gives the same output")

# %% [markdown]
# In a model, Q, K and V are three *learned* linear maps of the same vectors: `QKVAttention` holds
# them. With 512 numbers a word, ten words that ask and twenty that are looked at:

# %%
layer = QKVAttention(512, 64, 64, rngs=nnx.Rngs(0))
rngs = jax.random.split(jax.random.key(0))
asking = jax.random.normal(rngs[0], (1, 10, 512))
looked_at = jax.random.normal(rngs[1], (1, 20, 512))
print("QKVAttention:", layer(asking, looked_at, looked_at).shape)

# %% [markdown]
# ## 3. Three mistakes of the usual teaching code, and what each does
#
# **The axis.** The softmax must run over the keys, the last axis: each query's weights sum to 1. Over
# the queries (`axis=1` of (batch, query, key)), each *key's* weights sum to 1, and a query may get
# several times the values, or next to nothing.

# %%
wrong_axis = np.exp(scaled) / np.exp(scaled).sum(axis=0, keepdims=True)
print("weights of each query sum to", wrong_axis.sum(axis=-1), "in place of 1")
print("length of the outputs:", np.linalg.norm(wrong_axis @ value, axis=-1))
print("where it should be:   ", np.linalg.norm(output, axis=-1))
assert not np.allclose(wrong_axis.sum(axis=-1), 1.0)

# %% [markdown]
# **The scale.** The product of two random vectors of $d_k$ numbers has a deviation of $\sqrt{d_k}$.
# Without the division, the softmax picks one key and its gradient dies.

# %%
q, k = layer.query(asking), layer.key(looked_at)
heads = q[:, :, None], k[:, :, None]
with_scale = attention_weights(*heads)[0, 0]
without = attention_weights(*heads, scale=1.0)[0, 0]
print(
    f"largest weight of a query: {with_scale.max(-1).mean():.2f} with the scale, ",
    end="",
)
print(f"{without.max(-1).mean():.2f} without")
assert without.max(-1).mean() > 2 * with_scale.max(-1).mean()
show(
    "3_scale",
    ("with 1 / sqrt(d_k)", np.asarray(with_scale), range(10), range(20)),
    ("without", np.asarray(without), range(10), range(20)),
)

# %% [markdown]
# **The lengths.** A value belongs to a key. With 20 keys and 30 values there is no output, and the
# library says so; code that cuts one to the other's length answers with the wrong values.

# %%
try:
    layer(asking, looked_at, jnp.ones((1, 30, 512)))
except ValueError as error:
    print("ValueError:", error)
else:
    raise AssertionError("20 keys and 30 values were taken")

# %% [markdown]
# ## 4. A real sentence
#
# input -> features -> Q, K, V -> scores -> aggregate -> output. A word's features are here its
# groups of three letters, so that related forms are alike; the maps are the identity, so a word
# looks at the words it resembles. This function is all there is, for sentences and images:


# %%
def attend(features, sharpness=1.0):
    """features (S, D) -> output (S, D) and weights (S, S), by one call of the operator."""
    x = jnp.asarray(features, jnp.float32)[None, :, None]
    scale = sharpness / features.shape[-1] ** 0.5
    out = dot_product_attention(x, x, x, scale=scale)
    return np.asarray(out[0, :, 0]), np.asarray(
        attention_weights(x, x, scale=scale)[0, 0]
    )


def normalise(x):
    """Rows of mean 0 and length sqrt(D), so that alike means a large product."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) * x.shape[-1] ** 0.5


def letters(word, size=256):
    """How often each group of three letters is in a word; groups share places by their letters."""
    found = np.zeros(size)
    padded = f"<{word.lower()}>"
    for i in range(len(padded) - 2):
        a, b, c = (ord(letter) for letter in padded[i : i + 3])
        found[(a * 961 + b * 31 + c) % size] += 1
    return found


text = "A painter paints what painters painted before the cat sat on the cats"
sentence = text.split()
features = normalise(np.stack([letters(word) for word in sentence]))
output, weights = attend(features, sharpness=0.3)
print("painter looks most at:", [sentence[i] for i in np.argsort(-weights[1])[:4]])
assert set(np.argsort(-weights[1])[:4]) == {1, 2, 4, 5}
show(
    "4_sentence",
    ("features -> scores", features @ features.T / 16, sentence, sentence),
    ("weights", weights, sentence, sentence),
)

# %% [markdown]
# ## 5. A real image, through the same call
#
# An image is a set of patches. Features are a patch's colours and place; the call is `attend`, as
# above. What a patch looks at is drawn over the photograph (matplotlib's sample, in the public
# domain).

# %%
sample = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
photograph = plt.imread(sample)
P = 32
height, width = (photograph.shape[0] // P, photograph.shape[1] // P)
photograph = photograph[: height * P, : width * P]
patches = photograph.reshape(height, P, width, P, 3).swapaxes(1, 2) / 255.0
colours = (
    patches.reshape(height * width, 4, P // 4, 4, P // 4, 3)
    .mean(axis=(2, 4))
    .reshape(-1, 48)
)
places = np.indices((height, width)).reshape(2, -1).T / height
features = normalise(
    np.concatenate([colours, 2 * np.repeat(places, 6, axis=-1)], axis=-1)
)
output, weights = attend(features, sharpness=1.0)

panels = [("input", photograph, None, None)]
for name, at in (
    ("the background", (2, 12)),
    ("the face", (6, 7)),
    ("the uniform", (13, 4)),
):
    grid = weights[at[0] * width + at[1]].reshape(height, width)
    light = np.kron((grid / grid.max()) ** 0.5, np.ones((P, P)))[..., None]
    grey = photograph.mean(axis=-1, keepdims=True) / 255.0
    marked = (1 - 0.7 * light) * grey + 0.7 * light * np.array([1.0, 0.75, 0.1])
    marked[at[0] * P : (at[0] + 1) * P, at[1] * P : (at[1] + 1) * P] = [1.0, 0.2, 0.2]
    panels.append((f"what {name} looks at", marked, None, None))
show("5_image", *panels)
print("one call, two kinds of input: outputs of shape", output.shape)

# %% [markdown]
# ## 6. Learned: Q, K and V find out what to ask
#
# So far we chose the vectors. Here the three maps are trained: a row holds six pairs (a name, a
# number), and the last element asks for the number of one name. Nothing tells the layer where it
# is; it has to learn that the query's *name* is matched against names, and that *numbers* are
# handed over.

# %%
NAMES, NUMBERS, PAIRS = 8, 4, 6


def rows(rng, count):
    """Pairs (B, 6, 12), one-hot; what is asked (B, 1, 12); its place (B,) and number (B,)."""
    rngs = jax.random.split(rng, 3)
    names = jax.vmap(lambda r: jax.random.permutation(r, NAMES))(
        jax.random.split(rngs[0], count)
    )
    names = names[:, :PAIRS]
    numbers = jax.random.randint(rngs[1], (count, PAIRS), 0, NUMBERS)
    place = jax.random.randint(rngs[2], (count,), 0, PAIRS)
    pairs = jnp.concatenate(
        [jax.nn.one_hot(names, NAMES), jax.nn.one_hot(numbers, NUMBERS)], -1
    )
    asked = jnp.take_along_axis(names, place[:, None], 1)
    asks = jnp.pad(jax.nn.one_hot(asked, NAMES), ((0, 0), (0, 0), (0, NUMBERS)))
    return pairs, asks, place, jnp.take_along_axis(numbers, place[:, None], 1)[:, 0]


learner = QKVAttention(NAMES + NUMBERS, 16, NUMBERS, rngs=nnx.Rngs(1))
graph, params = nnx.split(learner, nnx.Param)
optimizer = optax.adam(0.02)


def loss_fn(params, rng):
    pairs, asks, _, number = rows(rng, 128)
    logits = nnx.merge(graph, params)(asks, pairs, pairs)[:, 0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, number).mean()


@jax.jit
def train(params):
    def step(carry, rng):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, rng)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    rngs = jax.random.split(jax.random.key(2), 400)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), rngs)
    return params, losses


trained, losses = train(params)
pairs, asks, place, number = rows(jax.random.key(3), 256)
found = []
for weights_of in (params, trained):
    model = nnx.merge(graph, weights_of)
    q, k = model.query(asks)[:, :, None], model.key(pairs)[:, :, None]
    w = attention_weights(q, k)[:, 0, 0]
    found.append(np.asarray(w))
    right = (model(asks, pairs, pairs)[:, 0].argmax(-1) == number).mean()
    print(
        f"right answers {float(right):.0%}, weight on the right pair {float(w[jnp.arange(256), place].mean()):.2f}"
    )
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert right > 0.95
marks = [f"row {i}: pair {int(place[i])}" for i in range(6)]
show(
    "6_learned",
    ("weights before training", found[0][:6], marks, range(PAIRS)),
    ("weights after", found[1][:6], marks, range(PAIRS)),
)

# %% [markdown]
# ## Where to go on
#
# Several such heads side by side, residuals and norms make `layers.MultiHeadAttention` and the
# blocks of the Transformer (`layers/transformer.py`, `models/seq2seq.py`). Who may look at whom is a
# mask, `ops.masks`; what is added to a score, a rule of `ops.scores`. Trained models and their
# attention: `make demo`, and the tasks in `experiments/`.
