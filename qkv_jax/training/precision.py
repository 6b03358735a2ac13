"""In which precision a model is trained: what parameters, products and moments are kept in.

Whatever is asked for, these are float32: the softmax, the statistics of norms, the loss, gradients
of parameters and their sums over tokens and microbatches, the optimizer's arithmetic, moving
averages, and what is not trained. Parameters in bfloat16 are read as float32 by the loss, whose
layers round them to the precision of their products: a step differentiates and updates float32
numbers, and rounds what it keeps of them.

Why no library. `flax.training.dynamic_scale` scales and adjusts at each gradient, not at each
update of several microbatches, and divides by its scale again where the loss is a sum. jmp is no
longer maintained. optax and flax (0.2.8, 0.12.8) round to the nearest alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.ops import index_bits

Array = jax.Array
Dtype = Literal["float32", "bfloat16", "float16"]
Kept = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "stochastic", "kahan"]
LARGEST_SCALE = 2.0**24
# Told apart from the numbers of microbatches, which the same rng is folded with.
PARAMS_STREAM, MOMENTS_STREAM = 0x70617261, 0x6D6F6D65
CHOICES: dict[str, tuple[Any, ...]] = {
    "params": get_args(Kept),
    "compute": (*get_args(Dtype), None),
    "output": (*get_args(Dtype), None),
    "moments": get_args(Kept),
    "rounding": get_args(Rounding),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes of a training run; the default is float32, but for what the model says.

    Attributes:
        params: that trained parameters are kept in; what is not trained stays as it is.
        compute: of the model's products; None: as the model's own `dtype` says. It takes the place
            of one that is "float32", and may not contradict another.
        output: of the product with the output embedding; None: as the model's `output_dtype`
            says, which is as `compute` unless it is given.
        moments: that the optimizer's arrays are kept in. "bfloat16" needs stochastic rounding: a
            mean whose decay is near 1 moves by less than half of what bfloat16 can tell.
        rounding: how what is kept in bfloat16 is rounded after an update: to the "nearest", which
            loses updates of less than 1/512 of a parameter; "stochastic": up or down, by chances
            that make the mean exact; "kahan": parameters to the nearest, and what that loses is
            kept too, in bfloat16, and added to the next update.
        loss_scale: what the loss a token is multiplied with before float16 gradients are made,
            at first; it is halved, and the update skipped, where one of them is not finite.
            None: 1, always.
        growth_interval: updates in a row with finite gradients that double it.

    Source: Micikevicius et al. 2018, arXiv 1710.03740 (float32 master weights, loss scaling);
    Zamirai et al. 2020, arXiv 2010.06192 (bfloat16 parameters by either rounding).
    """

    params: Kept = "float32"
    compute: Dtype | None = None
    output: Dtype | None = None
    moments: Kept = "float32"
    rounding: Rounding = "nearest"
    loss_scale: float | None = None
    growth_interval: int = 2000

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}; got {getattr(self, name)!r}."
                )
        self._check_rounding()
        self._check_scale()

    def _check_rounding(self) -> None:
        kept = {"params": self.params, "moments": self.moments}
        if self.rounding == "stochastic" and "bfloat16" not in kept.values():
            raise ValueError(
                "rounding='stochastic' needs params='bfloat16' or moments='bfloat16': float32 is "
                "not rounded."
            )
        if self.rounding == "kahan" and self.params != "bfloat16":
            raise ValueError(
                "rounding='kahan' needs params='bfloat16': float32 is not rounded."
            )
        if self.moments == "bfloat16" and self.rounding != "stochastic":
            raise ValueError(
                "moments='bfloat16' needs rounding='stochastic': rounded to the nearest, moments "
                f"that change little at a time stand still; got {self.rounding!r}."
            )

    def _check_scale(self) -> None:
        default = type(self).growth_interval
        if self.growth_interval < 1:
            raise ValueError(
                f"growth_interval must be at least 1; got {self.growth_interval}."
            )
        if self.loss_scale is None:
            if self.growth_interval != default:
                raise ValueError(
                    "growth_interval is of loss_scale: give it too, or leave growth_interval at "
                    f"{default}."
                )
        elif not 1.0 <= self.loss_scale <= LARGEST_SCALE:
            raise ValueError(
                f"loss_scale must be in 1 .. {LARGEST_SCALE:.0f}, or None; got {self.loss_scale}."
            )
        if self.compute is not None:
            _check_needed_scale(self.compute, self.loss_scale, "compute")


DEFAULT = PrecisionConfig()


def float32() -> PrecisionConfig:
    """Float32 throughout."""
    return PrecisionConfig(compute="float32")


def mixed_bf16() -> PrecisionConfig:
    """Products in bfloat16, float32 parameters."""
    return PrecisionConfig(compute="bfloat16")


def bf16(rounding: Rounding = "stochastic") -> PrecisionConfig:
    """Bfloat16 throughout: 6 bytes a parameter for Adam with stochastic rounding, in place of 12.

    With another rounding the moments stay float32: 10 bytes, with "kahan" 12.
    """
    return PrecisionConfig(
        params="bfloat16",
        compute="bfloat16",
        moments="bfloat16" if rounding == "stochastic" else "float32",
        rounding=rounding,
    )


def float16() -> PrecisionConfig:
    """Products in float16 with a dynamic loss scale, float32 parameters."""
    return PrecisionConfig(compute="float16", loss_scale=2.0**15)


def apply_precision(model: Any, precision: PrecisionConfig) -> Any:
    """A model's Config that computes as a policy says.

    Args:
        model: a frozen dataclass, which may have `dtype` and `output_dtype`.
        precision: the policy.

    Raises:
        ValueError: the two contradict each other; the model has no such choice; float16 without
            a loss scale, or a loss scale without float16.
    """
    names = {"dtype": precision.compute, "output_dtype": precision.output}
    changes = {}
    for name, asked in names.items():
        own = getattr(model, name, None)
        if asked is None or asked == own:
            continue
        field = "compute" if name == "dtype" else "output"
        if not hasattr(model, name):
            if name == "dtype" and asked == "float32":
                continue
            raise ValueError(
                f"precision.{field} cannot be {asked!r}: {type(model).__module__} has no {name} "
                "to choose, leave it None."
            )
        if own not in ("float32" if name == "dtype" else None,):
            raise ValueError(
                f"precision.{field} is {asked!r}, and model.{name} is {own!r}: say it in one place."
            )
        changes[name] = asked
    resolved = dataclasses.replace(model, **changes) if changes else model
    dtype = getattr(resolved, "dtype", "float32")
    _check_needed_scale(dtype, precision.loss_scale, "model.dtype")
    return resolved


def _check_needed_scale(dtype: str, scale: float | None, field: str) -> None:
    if dtype == "float16" and scale is None:
        raise ValueError(
            f"{field} 'float16' needs precision.loss_scale, such as 32768: gradients less than "
            "6e-8 are 0 in float16; 'bfloat16' needs none."
        )
    if dtype != "float16" and scale is not None:
        raise ValueError(
            f"loss_scale is of float16 and {field} is {dtype!r}, whose gradients do not vanish: "
            "leave loss_scale None."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionState:
    """What a policy remembers from update to update.

    Attributes:
        loss_scale: () float32, of the next update; None: there is none.
        finite_steps: () int32, updates with finite gradients since it last changed.
        lost: what rounding took from each parameter, bfloat16; None: it is not kept.
    """

    loss_scale: Array | None = None
    finite_steps: Array | None = None
    lost: Any = None


def start_precision(config: PrecisionConfig, params: Any) -> PrecisionState | None:
    """The state before the first update; None: the policy has none.

    Args:
        config: see PrecisionConfig.
        params: float32, what is trained.
    """
    lost = keep_params(config, params, None)[1]
    if config.loss_scale is None:
        return None if lost is None else PrecisionState(lost=lost)
    return PrecisionState(
        loss_scale=jnp.asarray(config.loss_scale, jnp.float32),
        finite_steps=jnp.zeros((), jnp.int32),
        lost=lost,
    )


def widen(tree: Any, lost: Any = None) -> Any:
    """Bfloat16 arrays as float32, with what rounding took from them; all else as it is."""
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree
    )
    if lost is None:
        return wide
    return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), wide, lost)


def keep_params(config: PrecisionConfig, params: Any, rng: Any) -> tuple[Any, Any]:
    """Float32 parameters -> what is kept of them, and what that loses, if that is kept too.

    Args:
        config: see PrecisionConfig.
        params: float32.
        rng: of this update; None: there was none yet, and the nearest is taken.

    Returns:
        Pytrees like params, the second None where nothing is kept.
    """
    if config.params == "float32":
        return params, None
    if config.rounding == "stochastic" and rng is not None:
        return _round_all(params, jax.random.fold_in(rng, PARAMS_STREAM)), None
    kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    if config.rounding != "kahan":
        return kept, None
    # With it, a parameter has 16 bits: more than the updates of a bfloat16 gradient have.
    lost = jax.tree.map(
        lambda x, k: (x - k.astype(jnp.float32)).astype(jnp.bfloat16), params, kept
    )
    return kept, lost


def keep_moments(config: PrecisionConfig, opt_state: Any, rng: Any) -> Any:
    """The float32 arrays of an optimizer's state as they are kept; numbers stay as they are.

    Args:
        config: see PrecisionConfig.
        opt_state: the optimizer's.
        rng: see keep_params.
    """
    if config.moments == "float32":
        return opt_state
    stream = None if rng is None else jax.random.fold_in(rng, MOMENTS_STREAM)
    return _round_all(opt_state, stream)


def _round_all(tree: Any, rng: Any) -> Any:
    """Arrays rounded, numbers as they are; rng None: to the nearest."""
    leaves, structure = jax.tree.flatten(tree)
    if rng is None:
        rounded = [x.astype(jnp.bfloat16) if _is_rounded(x) else x for x in leaves]
    else:
        # All seeds by one draw: a draw for each would be most of what there is to compile.
        seeds = jax.random.bits(rng, (len(leaves),), jnp.uint32)
        rounded = [
            stochastic_round(x, seed) if _is_rounded(x) else x
            for x, seed in zip(leaves, seeds)
        ]
    return jax.tree.unflatten(structure, rounded)


def _is_rounded(x: Array) -> bool:
    return x.ndim > 0 and x.dtype == jnp.float32


def stochastic_round(x: Array, seed: Array) -> Array:
    """Float32 -> bfloat16: one of the two neighbours, so that the expected value is x.

    Infinities stay, and so does the NaN that arithmetic makes.

    Args:
        x: float32, any shape.
        seed: () uint32. Each draw depends on it and on its index alone, so that the sharding of x
            does not change it.
    """
    noise = index_bits(seed, x.shape) >> 16
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise
    # The upper half is a bfloat16, and a carry into it is the next one.
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def scaled_gradient(
    loss_fn: Callable[..., Any], scale: Array | None
) -> Callable[[Any, Any, Any], tuple[Any, dict[str, Array]]]:
    """As jax.grad(loss_fn, has_aux=True), by way of a loss that float16 can differentiate.

    What is differentiated is the loss times scale / tokens, or less than twice that: a power of
    two where the scale is one, so that the division of the float32 gradients by it is exact.

    Args:
        loss_fn: see `training.step.LossFn`.
        scale: (), or None: the loss is differentiated as it is.
    """
    if scale is None:
        return jax.grad(loss_fn, has_aux=True)

    def gradient(params: Any, batch: Any, rng: Any) -> tuple[Any, dict[str, Array]]:
        def scaled(params: Any) -> tuple[Array, Any]:
            loss, sums = loss_fn(params, batch, rng)
            exponent = jnp.frexp(jnp.maximum(sums["tokens"], 1.0))[1]
            factor = lax.stop_gradient(jnp.ldexp(scale, 1 - exponent))
            return loss * factor, (sums, factor)

        grads, (sums, factor) = jax.grad(scaled, has_aux=True)(params)
        return jax.tree.map(lambda g: g / factor, grads), sums

    return gradient


def adjust_scale(
    config: PrecisionConfig, state: PrecisionState, finite: Array
) -> PrecisionState:
    """Half the scale after gradients that are not finite; double after enough that are.

    Args:
        config: see PrecisionConfig.
        state: of the update just made.
        finite: () bool, whether its gradients are.
    """
    scale, steps = state.loss_scale, state.finite_steps
    if scale is None or steps is None:
        return state
    steps = steps + 1
    grow = steps >= config.growth_interval
    grown = jnp.where(grow, jnp.minimum(2.0 * scale, LARGEST_SCALE), scale)
    return dataclasses.replace(
        state,
        loss_scale=jnp.where(finite, grown, jnp.maximum(0.5 * scale, 1.0)),
        finite_steps=jnp.where(finite & ~grow, steps, 0),
    )
