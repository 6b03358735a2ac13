"""The whole state of a training run on the devices, as one frozen pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qkv_jax.training.adapters import FinetuneConfig, split_params
from qkv_jax.training.precision import (
    DEFAULT,
    PrecisionConfig,
    keep_moments,
    keep_params,
    start_precision,
)
from qkv_jax.training.sharding import place_state, state_shardings
from qkv_jax.training.sparsity import (
    NO_SPARSITY,
    Masks,
    SparsityConfig,
    apply_masks,
    new_masks,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a train step reads and writes.

    Attributes:
        step: () int32, updates made.
        params: pytree of float32 arrays, or of bfloat16 ones, see PrecisionConfig: all of the
            model, or the part that is trained, see split_params.
        opt_state: the optimizer's.
        rng: key data (not a typed key, so that it can be saved), the same in all steps: step n
            uses fold_in(rng, n), whether or not the run was interrupted before n.
        ema: average of params, exponential or the optimizer's own: what is evaluated; or None.
        constant: the part of the model that is not trained, see split_params; None: there is none.
        masks: which weights are not 0, see SparsityConfig; None: all may be anything.
        precision: see PrecisionState; None: the policy remembers nothing.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    ema: Any = None
    constant: Any = None
    masks: Masks | None = None
    precision: Any = None


def create_state(
    params: Any | Callable[[], Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh,
    rng_impl: str = "rbg",
    ema: bool = False,
    finetune: FinetuneConfig | None = None,
    sparsity: SparsityConfig = NO_SPARSITY,
    masks: Masks | None = None,
    precision: PrecisionConfig = DEFAULT,
) -> TrainState:
    """The state before the first step, made on the mesh: shapes first, then places, then values.

    Args:
        params: pytree of float32 arrays, which is copied, numpy's shard by shard into its place;
            or a function that makes it, run under jit straight there: both for models larger
            than one device.
        optimizer: see make_optimizer.
        seed: of the steps' random numbers (dropout) and of new adapters, not of the parameters.
        mesh: see make_mesh.
        rng_impl: jax PRNG implementation; "rbg" is cheap on CPU and on accelerators.
        ema: keep an average of what is trained, which starts at it.
        finetune: which part is trained; None: all.
        sparsity: which of its weights will be 0.
        masks: which are, from the start, where sparsity is that of a ticket.
        precision: what is kept of it.

    Raises:
        ValueError: the mesh does not divide the model, see state_shardings; or see split_params
            and new_masks.
    """
    create = _creator(
        params, optimizer, seed, rng_impl, ema, finetune, sparsity, precision
    )
    given = (
        None if callable(params) else place_state(params, mesh),
        None if masks is None else place_state(masks, mesh),
    )
    places = state_shardings(jax.eval_shape(create, given), mesh)
    return jax.jit(create, out_shardings=places)(given)


def abstract_state(
    params: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    rng_impl: str = "rbg",
    ema: bool = False,
    finetune: FinetuneConfig | None = None,
    sparsity: SparsityConfig = NO_SPARSITY,
    precision: PrecisionConfig = DEFAULT,
) -> TrainState:
    """The shapes, dtypes and shardings of what create_state would make; nothing is made."""
    create = _creator(
        params, optimizer, 0, rng_impl, ema, finetune, sparsity, precision
    )
    shapes = jax.eval_shape(create, (None, None))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_shardings(shapes, mesh),
    )


def _creator(
    params, optimizer, seed, rng_impl: str, ema: bool, finetune, sparsity, precision
):
    def create(given: tuple[Any, Masks | None]) -> TrainState:
        whole = params() if callable(params) else given[0]
        whole, masks = apply_masks(whole, given[1]), given[1]
        made, constant = split_params(whole, finetune, seed=seed)
        if masks is None and sparsity.final is not None:
            masks = new_masks(made, sparsity)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=keep_params(precision, made, None)[0],
            opt_state=keep_moments(precision, optimizer.init(made), None),
            rng=jax.random.key_data(jax.random.key(seed, impl=rng_impl)),
            ema=made if ema else None,
            constant=constant,
            masks=masks,
            precision=start_precision(precision, made),
        )

    return create
