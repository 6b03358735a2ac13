"""Fine-tuning a part of a model: parameters frozen by name, and low-rank adapters (LoRA).

A model's parameters are split once into what is trained and what is constant, two pytrees of the
same structure with None where the other one has the array. The optimizer, its moments, weight
decay, the norm of the gradient and the moving average see the trained one alone; the constant
one is differentiated and written by nothing, and the loss is handed both, merged.

Why no library. `flax.nnx.LoRA` wraps layers, knows kernels of two axes only, and has no scale and
no merge. `qwix.LoraProvider` (0.1.8) replaces the operations of a module's class as the module is
traced: it needs the module and a sample of its inputs where `train` is handed a function of
parameters; it flattens kernels of three axes and gives the factors the names of the axes of the
whole, so that meshes and Muon take them for something else; its dropout keeps its random state in
the module; and it has no merge either.
"""

import dataclasses
import difflib
import fnmatch
import math
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.ops import dropout
from qkv_jax.ops.axes import input_axes

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: each chosen kernel W acts as W + alpha / rank * A B; W is constant.

    Attributes:
        rank: r, columns of A and rows of B; None: no adapters.
        alpha: the adapters' weight, over rank.
        dropout: of the inputs of the adapters. One draw of features for all tokens of a
            microbatch, where the paper's code draws for each token.
        kernels: patterns of the dotted names of the kernels that get an adapter; the default is the
            paper's choice, queries and values, of self- and cross-attention.

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3 and section 4.2.
    """

    rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    kernels: tuple[str, ...] = ("*.query.kernel", "*.value.kernel")

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive; got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}.")
        check_patterns("kernels", self.kernels)
        if not self.kernels:
            raise ValueError("kernels must have at least one pattern; got none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which part of a model is trained. The default is all of it.

    Patterns are those of a shell, over dotted names such as "encoder.0.attention.query.kernel":
    "*" stands for any characters, dots too.

    Attributes:
        freeze: parameters that stay as they are: "encoder.*", "*embedding*", "decoder.0.*".
        lora: adapters, which are then all that is trained.
    """

    freeze: tuple[str, ...] = ()
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
        check_patterns("freeze", self.freeze)
        if self.freeze and self.lora.rank is not None:
            raise ValueError(
                "lora leaves every parameter of the model as it is, so freeze must be empty; "
                f"got {self.freeze}."
            )

    @property
    def whole(self) -> bool:
        """Whether everything is trained."""
        return not self.freeze and self.lora.rank is None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The factors of one kernel's change.

    Attributes:
        lora_a: (*inputs, r), as the kernel's own: an array, or an `nnx.Param` with named axes.
        lora_b: (r, *outputs), the same.
    """

    lora_a: Any
    lora_b: Any


class ParamCounts(NamedTuple):
    """Numbers of a model.

    Attributes:
        trained: those that training changes.
        all: those and the constant ones; adapters count.
    """

    trained: int
    all: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.all
        return f"{self.trained:,} of {self.all:,} ({share:.2f}%)"


def split_params(
    params: Any, finetune: FinetuneConfig | None, *, seed: int = 0
) -> tuple[Any, Any]:
    """Parameters -> what is trained, and what is constant.

    Args:
        params: pytree of float arrays, or of `nnx.Variable`s, which may name their axes in the
            metadata "axes".
        finetune: see FinetuneConfig; None: everything is trained.
        seed: draws A from a normal of variance 1 / inputs. B starts at 0, so that the first step's
            loss is the model's own. Of a table of embeddings A starts at 0, and B is drawn from a
            normal of variance 1 / r, so that rows without a gradient stay as they are.

    Returns:
        (trained, constant): pytrees of the structure of params with None where the other has the
        parameter; with LoRA, constant is params, and trained has an Adapter for each chosen kernel.
        Where everything is trained: (params, None).

    Raises:
        ValueError: a pattern that matches no parameter; nothing is left to train; a parameter that
            is chosen for an adapter is no matrix, or is smaller than the adapter's rank.
    """
    if finetune is None or finetune.whole:
        return params, None
    names = param_names(params)
    lora, rank = finetune.lora, finetune.lora.rank
    if rank is None:
        frozen = matching_names("freeze", finetune.freeze, names)
        if frozen >= set(names):
            raise ValueError(
                f"freeze={finetune.freeze} leaves none of the {len(names)} parameters to train: "
                "remove a pattern."
            )
        trained = map_params(lambda name, x: None if name in frozen else x, params)
        return trained, map_params(
            lambda name, x: x if name in frozen else None, params
        )
    adapted = matching_names("lora.kernels", lora.kernels, names)
    rng = jax.random.key(seed, impl="threefry2x32")

    def adapt(name: str, kernel: Any) -> Adapter | None:
        if name not in adapted:
            return None
        return _adapter(name, kernel, rank, _fold(rng, name))

    return map_params(adapt, params), params


def merge_params(
    trained: Any,
    constant: Any,
    finetune: FinetuneConfig | None,
    *,
    rng: Array | None = None,
) -> Any:
    """What split_params parted, as plain parameters again: to evaluate, decode, export.

    Within a step, the change A B of a kernel costs O(inputs r outputs), and its gradient passes
    through the gradient of the whole kernel, which the constant one would not need: for the few
    adapted kernels of a step of thousands of tokens that is little beside the products with
    activations. Outside of jit, arrays without an adapter are handed on, not copied.

    Args:
        trained: see split_params; also a moving average of it.
        constant: see split_params.
        finetune: that of split_params.
        rng: draws the adapters' dropout; None: none.

    Returns:
        A pytree of the original structure, shapes, dtypes and shardings.
    """
    if finetune is None or finetune.whole:
        return trained
    lora = finetune.lora

    def join(name: str, there: Any, other: Any) -> Any:
        if not isinstance(other, Adapter):
            return other if there is None else there
        drawn = None if rng is None else _fold(rng, name)
        return _merged(there, other, lora, drawn)

    return map_params(join, constant, trained)


def count_params(params: Any, finetune: FinetuneConfig | None = None) -> ParamCounts:
    """How many numbers are trained, of how many; arrays or ShapeDtypeStructs.

    Raises:
        ValueError: see split_params, which this checks without making anything.
    """
    trained, constant = jax.eval_shape(lambda x: split_params(x, finetune), params)
    parts = [
        sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for t in (trained, constant)
    ]
    return ParamCounts(parts[0], sum(parts))


def _merged(kernel: Any, adapter: Adapter, lora: LoraConfig, rng: Array | None) -> Any:
    (a,), (b,) = jax.tree.leaves(adapter.lora_a), jax.tree.leaves(adapter.lora_b)
    a = a * dropout(jnp.ones((*a.shape[:-1], 1), a.dtype), lora.dropout, rng)
    # As exact as float32 is, also on devices that would round to bfloat16.
    change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    scale = lora.alpha / b.shape[0]
    return jax.tree.map(lambda w: w + scale * change, kernel)


def _adapter(name: str, kernel: Any, rank: int, rng: Array) -> Adapter:
    axes, (array,) = _axes(kernel), jax.tree.leaves(kernel)
    if array.ndim < 2 or (axes is None and array.ndim > 2):
        raise ValueError(
            f"lora.kernels matches {name!r} of shape {array.shape}, which is no matrix: name "
            "kernels only, such as '*.query.kernel'."
        )
    split = 1 if axes is None else input_axes(axes)
    inputs, outputs = array.shape[:split], array.shape[split:]
    if rank > min(math.prod(inputs), math.prod(outputs)):
        raise ValueError(
            f"lora.rank must not exceed the sides of {name!r}, {math.prod(inputs)} and "
            f"{math.prod(outputs)}; got {rank}."
        )
    a, b = jnp.zeros((*inputs, rank)), jnp.zeros((rank, *outputs))
    if axes is not None and axes[0] == "vocab":
        b = jax.random.normal(rng, b.shape) * rank**-0.5
    else:
        a = jax.random.normal(rng, a.shape) * math.prod(inputs) ** -0.5
    a, b = a.astype(array.dtype), b.astype(array.dtype)
    if axes is None:
        return Adapter(lora_a=a, lora_b=b)
    return Adapter(
        lora_a=nnx.Param(a, axes=(*axes[:split], "rank")),
        lora_b=nnx.Param(b, axes=("rank", *axes[split:])),
    )


def _axes(param: Any) -> tuple[str | None, ...] | None:
    """The names of a parameter's axes; None: it has none."""
    if not isinstance(param, nnx.Variable):
        return None
    return param.get_metadata().get("axes")


def _fold(rng: Array, name: str) -> Array:
    """Random numbers of this parameter, whatever other parameters there are."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def param_names(params: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [_name(path) for path, _ in leaves]


def map_params(function: Any, tree: Any, *rest: Any) -> Any:
    """function(name, parameter or None, ...), for each parameter and each place without one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *nodes: function(_name(path), *nodes),
        tree,
        *rest,
        is_leaf=lambda x: x is None or isinstance(x, nnx.Variable),
    )


def check_patterns(field: str, patterns: Any) -> None:
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f"{field} must be a tuple of patterns, such as ('encoder.*',); got {patterns!r}."
        )


def matching_names(field: str, patterns: Iterable[str], names: list[str]) -> set[str]:
    """The names that any of the patterns matches; each must match one."""
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, _nameable(names), cutoff=0.0)
            raise ValueError(
                f"{field} has the pattern {pattern!r}, which matches no parameter; near it: "
                f"{', '.join(map(repr, near))}."
            )
        found.update(matched)
    return found


def _nameable(names: list[str]) -> list[str]:
    """The names, and a pattern for each folder of them: 'encoder.*'."""
    parts = [name.split(".") for name in names]
    folders = {".".join(p[:i]) + ".*" for p in parts for i in range(1, len(p))}
    return sorted(folders | set(names))
