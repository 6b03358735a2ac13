"""Attention in loops, differentiable twice and in both modes, in O(T + S) memory.

JAX cannot go back through a loop of unknown length, but forward mode goes through any. Of
f(x) = (output, log-sum-exp) the way back, w -> J^T w, is written out by hand. The rest follows:

    the tangent of f            x' -> J x'                    its transpose: w -> J^T w
    the tangent of J^T w        x', w' -> C x' + J^T w'       its transpose: c -> C c, J c
    the tangent of J t          x', t' -> D x' + J t'         its transpose: u -> C_u t, J^T u

C = d(J^T w)/dx is its own transpose, for it is the second derivative of w . f; so is C_u that of
u . f. J x' and C x' are forward mode through the loops there and back.

What has to be transposed is one call of `linear_p`, a primitive that knows its transpose: a
`jax.custom_vjp` refuses forward mode, and `jax.custom_derivatives.linear_call` vmap and tangents
of what it is not linear in. Names of `jax.interpreters` stand in this file alone.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qkv_jax.ops.parts import Inputs, Softmax, logsumexp

Array = jax.Array
Arrays = Sequence[Array]


def differentiable(
    there: Callable[..., Softmax], back: Callable[..., list[Array]]
) -> Callable[..., tuple[Array, Array]]:
    """The function (inputs, *static) -> (output, log-sum-exp), and all of its derivatives.

    Gradients are those of query, key, value and the floating arrays of the score.

    Args:
        there: (inputs, *static) -> Softmax; `static` is hashable, and known at trace time.
        back: (inputs, Softmax, (slope of the output, of the log-sum-exp), *static) -> the
            gradients, see `parts.cotangents`.
    """

    @functools.wraps(there)
    def attend(inputs: Inputs, *static: Any) -> tuple[Array, Array]:
        leaves, tree = jax.tree.flatten(inputs)
        loops = Loops(there, back, static, tree, moving(inputs))
        x, rest = loops.split(leaves)
        out, residual, *_ = _look(loops, x, jax.lax.stop_gradient(rest))
        return out, residual

    return attend


def moving(inputs: Inputs) -> tuple[bool, ...]:
    """Of each leaf, whether it has a gradient."""

    def of(part: Any, may: bool) -> Any:
        return jax.tree.map(
            lambda x: may and jnp.issubdtype(x.dtype, jnp.floating), part
        )

    names = ("query", "key", "value", "score")
    marked = (of(part, name in names) for name, part in inputs._asdict().items())
    return tuple(map(bool, jax.tree.leaves(list(marked))))


@dataclass(frozen=True)
class Loops:
    """One attention's loops, as functions of lists of arrays.

    Attributes:
        there, back, static: see `differentiable`.
        tree: the structure of its inputs.
        moves: which of their leaves have gradients: these are `x`, the others `rest`.
    """

    there: Callable[..., Softmax]
    back: Callable[..., list[Array]]
    static: tuple[Any, ...]
    tree: Any
    moves: tuple[bool, ...]

    def split(self, leaves: Arrays) -> tuple[list[Array], list[Array]]:
        pairs = list(zip(leaves, self.moves))
        return [x for x, on in pairs if on], [x for x, on in pairs if not on]

    def _inputs(self, x: Arrays, rest: Arrays) -> Inputs:
        of_x, of_rest = iter(x), iter(rest)
        leaves = [next(of_x if on else of_rest) for on in self.moves]
        return jax.tree.unflatten(self.tree, leaves)

    def look(self, x: Arrays, rest: Arrays) -> list[Array]:
        """What is found: the output, the log-sum-exp, the maxima and the sums."""
        found = self.there(self._inputs(x, rest), *self.static)
        return [found.out, logsumexp(found), found.top, found.total]

    def look_back(
        self, x: Arrays, rest: Arrays, found: Softmax, w: Arrays
    ) -> list[Array]:
        """J^T w."""
        return self.back(self._inputs(x, rest), found, tuple(w), *self.static)

    def tangent(self, x: Arrays, rest: Arrays, d_x: Arrays) -> list[Array]:
        """J x'."""

        def run(x: Arrays) -> list[Array]:
            return self.look(x, rest)[:2]

        return jax.jvp(run, (list(x),), (list(d_x),))[1]

    def curve(
        self, x: Arrays, rest: Arrays, found: Arrays, w: Arrays, dots: Any
    ) -> list[Array]:
        """C x' + J^T w', dots being x', found' = J x', and w'."""
        d_x, (d_out, _, d_top, d_total), d_w = dots
        out, _, top, total = found

        def run(x: Arrays, found: Softmax, w: Arrays) -> list[Array]:
            return self.look_back(x, rest, found, w)

        at = list(x), Softmax(out, top, total), list(w)
        d_found = Softmax(d_out, d_top, d_total)
        return jax.jvp(run, at, (list(d_x), d_found, list(d_w)))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look(loops: Loops, x: Arrays, rest: Arrays) -> list[Array]:
    return loops.look(x, rest)


@_look.defjvp
def _look_jvp(loops: Loops, primals: Any, tangents: Any):
    x, rest = primals
    found = _look(loops, x, rest)
    return found, _dots(found, _linear(Tangent(loops), rest, [*x, *found], tangents[0]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look_back(loops: Loops, x: Arrays, rest: Arrays, found: Arrays, w: Arrays):
    out, _, top, total = found
    return loops.look_back(x, rest, Softmax(out, top, total), w)


@_look_back.defjvp
def _look_back_jvp(loops: Loops, primals: Any, tangents: Any):
    x, rest, found, w = primals
    d_x, _, d_found, d_w = tangents
    dots = _linear(Curve(loops), rest, [*x, *found, *w], [*d_x, *d_found, *d_w])
    return _look_back(loops, x, rest, found, w), dots


@dataclass(frozen=True)
class Slope:
    """The tangent of a call by what it is not linear in and what it is, one after the other.

    Attributes:
        one: whose.
        count: arrays that it is not linear in.
    """

    one: Any
    count: int

    def call(self, rest: Arrays, at: Arrays, dots: Arrays) -> list[Array]:
        def run(arrays: Arrays) -> list[Array]:
            return self.one.call(rest, arrays[: self.count], arrays[self.count :])

        return jax.jvp(run, (at,), (dots,))[1]

    def transposed(self, rest: Arrays, at: Arrays, u: Arrays) -> list[Array]:
        if isinstance(self.one, Tangent):
            return self.one.slope_transposed(rest, at, u)
        raise NotImplementedError(
            "attention in blocks goes back through its loops twice, and no further: "
            "for derivatives of a higher order, pass implementation='reference'."
        )

    def like(self, at: Arrays) -> Arrays:
        return self.one.like(at[: self.count])


@dataclass(frozen=True)
class Tangent:
    """x' -> J x', at (x, found)."""

    loops: Loops

    def call(self, rest: Arrays, at: Arrays, dots: Arrays) -> list[Array]:
        return self.loops.tangent(_parts(self.loops, at)[0], rest, dots)

    def transposed(self, rest: Arrays, at: Arrays, u: Arrays) -> list[Array]:
        x, found, _ = _parts(self.loops, at)
        return _look_back(self.loops, x, rest, found, u)

    def slope_transposed(self, rest: Arrays, at: Arrays, u: Arrays) -> list[Array]:
        """u -> C_u t, J^T u, at (x, found, t)."""
        x, found, t = _parts(self.loops, at)
        d_found = _linear(self, rest, [*x, *found], t)
        dots = [*t, *_dots(found, d_found), *_zeros(u)]
        d_x = _linear(Curve(self.loops), rest, [*x, *found, *u], dots)
        return [*d_x, *_zeros(found), *self.transposed(rest, at, u)]

    def like(self, at: Arrays) -> Arrays:
        """Of the form of what `call` gives."""
        return _parts(self.loops, at)[1][:2]


@dataclass(frozen=True)
class Curve:
    """x', found', w' -> C x' + J^T w', at (x, found, w); found' has to be J x'."""

    loops: Loops

    def call(self, rest: Arrays, at: Arrays, dots: Arrays) -> list[Array]:
        x, found, w = _parts(self.loops, at)
        return self.loops.curve(x, rest, found, w, _parts(self.loops, dots))

    def transposed(self, rest: Arrays, at: Arrays, c: Arrays) -> list[Array]:
        x, found, w = _parts(self.loops, at)
        d_w = _linear(Tangent(self.loops), rest, [*x, *found], c)
        dots = [*c, *_dots(found, d_w), *_zeros(w)]
        # What it would get by way of what was found is in C c already.
        return [*_linear(self, rest, at, dots), *_zeros(found), *d_w]

    def like(self, at: Arrays) -> Arrays:
        return _parts(self.loops, at)[0]


@dataclass(frozen=True)
class Mapped:
    """A call under vmap; of all arrays but some of `rest`, the first axis is mapped over."""

    one: Any
    axes: tuple[int | None, ...]

    def call(self, rest: Arrays, at: Arrays, dots: Arrays) -> list[Array]:
        return self._map(self.one.call)(rest, at, dots)

    def transposed(self, rest: Arrays, at: Arrays, u: Arrays) -> list[Array]:
        return self._map(self.one.transposed)(rest, at, u)

    def _map(self, run: Callable) -> Callable:
        return jax.vmap(run, in_axes=(list(self.axes), 0, 0))

    def like(self, at: Arrays) -> Arrays:
        return self.one.like(at)


def _slope(one: Any, count: int) -> Any:
    """The tangent of a call; of a mapped one, the mapped tangent, which may go back."""
    if isinstance(one, Mapped):
        return Mapped(_slope(one.one, count), one.axes)
    return Slope(one, count)


def _parts(
    loops: Loops, arrays: Arrays
) -> tuple[list[Array], list[Array], list[Array]]:
    """x, found, and what else there is."""
    n = sum(loops.moves)
    return list(arrays[:n]), list(arrays[n : n + 4]), list(arrays[n + 4 :])


def _dots(found: Arrays, results: Arrays) -> list[Array]:
    """found', from that of the output and of the log-sum-exp.

    The maxima stay, whatever the scores; so the sums follow from the log-sum-exp.
    """
    _, _, top, total = found
    return [*results, jnp.zeros_like(top), total * results[1][..., None]]


def _zeros(arrays: Arrays) -> list[Array]:
    return list(map(jnp.zeros_like, arrays))


# A call of one of the functions above: linear in the last of its arguments, and differentiable
# in those before, but for the first, `rest`.
linear_p = Primitive("linear_attention_call")
linear_p.multiple_results = True


def _linear(run: Any, rest: Arrays, at: Arrays, dots: Arrays) -> list[Array]:
    return linear_p.bind(*rest, *at, *dots, run=run, counts=(len(rest), len(at)))


def _groups(arrays: Any, counts: tuple[int, int]) -> tuple[list, list, list]:
    start, end = counts[0], sum(counts)
    return list(arrays[:start]), list(arrays[start:end]), list(arrays[end:])


def _run(*arrays: Array, run: Any, counts: tuple[int, int]) -> list[Array]:
    return run.call(*_groups(arrays, counts))


linear_p.def_impl(jax.jit(_run, static_argnames=("run", "counts")))
mlir.register_lowering(linear_p, mlir.lower_fun(_run, multiple_results=True))


@linear_p.def_abstract_eval
def _abstract(*arrays: Any, run: Any, counts: tuple[int, int]) -> Any:
    return list(run.like(_groups(arrays, counts)[1]))


def _jvp(primals: Any, tangents: Any, *, run: Any, counts: tuple[int, int]) -> Any:
    rest, at, t = _groups(primals, counts)
    _, d_at, d_t = _groups(_filled_in(tangents), counts)
    out = _linear(run, rest, at, t)
    if all(type(x) is ad.Zero for x in _groups(tangents, counts)[1]):
        return out, _linear(run, rest, at, d_t)
    return out, _linear(_slope(run, len(at)), rest, [*at, *t], [*d_at, *d_t])


def _filled_in(tangents: Any) -> list[Any]:
    return [ad.instantiate_zeros(x) for x in tangents]


def _transpose(slopes: Any, *arrays: Any, run: Any, counts: tuple[int, int]) -> Any:
    rest, at, dots = _groups(arrays, counts)
    found = run.transposed(rest, at, _filled_in(slopes))
    wanted = [y if ad.is_undefined_primal(x) else None for x, y in zip(dots, found)]
    return [None] * sum(counts) + wanted


def _batch(arrays: Any, axes: Any, *, run: Any, counts: tuple[int, int]) -> Any:
    size = next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)

    def lead(x: Array, axis: int | None) -> Array:
        if axis is None:
            return jnp.broadcast_to(x[None], (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    start = counts[0]
    moved = [lead(x, a) for x, a in zip(arrays[start:], axes[start:])]
    mapped = Mapped(run, tuple(axes[:start]))
    out = linear_p.bind(*arrays[:start], *moved, run=mapped, counts=counts)
    return out, [0] * len(out)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
