"""What a step will cost on a mesh, from its compiled program, before anyone rents the machine.

The step is compiled for as many simulated devices as the mesh has. XLA's own analysis of the program
of one device gives its memory; its collectives are read from its text.
"""

import collections
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

# Bytes of one element, by XLA's names of types.
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Published peak rates of one device.

    Attributes:
        name: of the device.
        bf16, f32: floating-point operations of matrix products a second, dense, float16's as
            bfloat16's; f32 with the tensor units' reduced precision where that is what products
            use.
        memory: bytes a second.
        link: bytes a second to other devices, in one direction, all links of the device.
        bytes: of memory.
    """

    name: str
    bf16: float
    f32: float
    memory: float
    link: float
    bytes: float


# NVIDIA's data sheets of the H100 SXM and H200 SXM (f32: TF32; link: half of NVLink's 900 GB/s);
# Google's pages "TPU v5e", "v5p", "v6e" (f32: a sixth of bf16, six passes; link: half of the
# interchip bandwidth).
HARDWARE = (
    Hardware(
        name="H100", bf16=989e12, f32=494e12, memory=3.35e12, link=450e9, bytes=80e9
    ),
    Hardware(
        name="H200", bf16=989e12, f32=494e12, memory=4.8e12, link=450e9, bytes=141e9
    ),
    Hardware(
        name="TPU v5e", bf16=197e12, f32=33e12, memory=819e9, link=100e9, bytes=16e9
    ),
    Hardware(
        name="TPU v5p", bf16=459e12, f32=76e12, memory=2.765e12, link=300e9, bytes=95e9
    ),
    Hardware(
        name="TPU v6e", bf16=918e12, f32=153e12, memory=1.64e12, link=224e9, bytes=32e9
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        count: how many are run.
        bytes: that a device sends, by the usual ring algorithms.
    """

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long a step would take if a device did nothing but one thing.

    Attributes:
        compute, memory, network: seconds at peak rate.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """If all three overlap: no step is faster."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        return max(
            ("compute", "memory", "network"), key=lambda name: getattr(self, name)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step costs one device of the mesh.

    Attributes:
        devices: of the mesh.
        tokens: real and padding target tokens of a step, all devices.
        flops: floating-point operations of a step's products, all devices.
        held: bytes of "parameters", "optimizer", "gradients" and "activations" (all other
            temporaries at the step's peak), and of a "teacher" where there is one.
        read: bytes that the step reads and writes, by XLA's count; loops count once.
        collectives: by kind.
        dtype: of the products.
    """

    devices: int
    tokens: int
    flops: float
    held: dict[str, float]
    read: float
    collectives: dict[str, Collective]
    dtype: str

    @property
    def bytes(self) -> float:
        """Of memory that a device needs."""
        return sum(self.held.values())

    def estimate(self, hardware: Hardware) -> Estimate:
        """The step's time on a mesh of such devices."""
        peak = hardware.f32 if self.dtype == "float32" else hardware.bf16
        moved = sum(collective.bytes for collective in self.collectives.values())
        return Estimate(
            compute=self.flops / self.devices / peak,
            memory=self.read / hardware.memory,
            network=moved / hardware.link,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, and the estimates on all of HARDWARE."""
        estimates = {}
        for hardware in HARDWARE:
            found = self.estimate(hardware)
            estimates[hardware.name] = dataclasses.asdict(found) | {
                "bound": found.bound,
                "tokens_per_second": self.tokens / found.seconds,
                "fits": self.bytes <= hardware.bytes,
            }
        return dataclasses.asdict(self) | {"estimates": estimates}


def plan_step(
    step: Any, state: Any, batch: Any, *, tokens: int, flops: float, dtype: str
) -> Plan:
    """Compiles a step for its mesh and reads off what it costs.

    Args:
        step: see make_train_step.
        state: a TrainState of ShapeDtypeStructs with shardings, see abstract_state.
        batch: a dict of ShapeDtypeStructs.
        tokens, flops, dtype: see Plan.
    """
    compiled = step.lower(state, batch).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    parameters = device_bytes((state.params, state.constant))
    # Always float32, whatever parameters are kept in.
    wide = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
        state.params,
    )
    gradients = min(device_bytes(wide), memory.temp_size_in_bytes)
    optimizer = device_bytes((state.opt_state, state.ema, state.precision))
    held = {
        "parameters": parameters,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": memory.temp_size_in_bytes - gradients,
    }
    devices = jax.tree.leaves(state.params)[0].sharding.num_devices
    return Plan(
        devices=devices,
        tokens=tokens,
        flops=flops,
        held=held,
        read=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(compiled.as_text()),
        dtype=dtype,
    )


def device_bytes(tree: Any) -> float:
    """Bytes that one device holds of arrays, or of ShapeDtypeStructs, with shardings."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program of one device, loops of known length multiplied out.

    Args:
        text: of the optimised HLO module.
    """
    bodies, entry = _computations(text)
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            operation = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if operation is not None:
                result, kind = operation.group(1), operation.group(2)
                sent = _sent(kind, _bytes(result), _group(line))
                found[kind][0] += times
                found[kind][1] += times * sent
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line):
                visit(inner, times * (int(trips.group(1)) if trips else 1))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for inner in branches.split(","):
                    visit(inner.strip().lstrip("%"), times)

    visit(entry, 1)
    return {
        kind: Collective(count=int(count), bytes=sent)
        for kind, (count, sent) in sorted(found.items())
    }


def this_machine(size: int = 1024, seconds: float = 0.3) -> Hardware:
    """What one process gets out of this machine: products in float32, and copies.

    Measured here and now, so it is as noisy as the machine is busy.
    """
    x = jnp.ones((size, size), jnp.float32)
    y = jnp.ones((64 * size, size), jnp.float32)
    product = _rate(jax.jit(lambda: x @ x), 2.0 * size**3, seconds)
    copied = _rate(jax.jit(lambda: y + 1.0), 2.0 * y.nbytes, seconds)
    return Hardware(
        name="this machine",
        bf16=product,
        f32=product,
        memory=copied,
        link=copied,
        bytes=math.inf,
    )


def _rate(run: Any, amount: float, seconds: float) -> float:
    run().block_until_ready()
    began, turns = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run().block_until_ready()
        turns += 1
    return amount * turns / (time.perf_counter() - began)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of an HLO module by its name, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header is not None and not line.startswith(" "):
            name = header.group(2)
            bodies[name] = []
            entry = name if header.group(1) else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _bytes(result: str) -> float:
    """Of a result type, such as f32[8,4]{1,0} or a tuple of them."""
    total = 0.0
    for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result):
        integer = re.fullmatch(r"[su](\d+)", kind)
        size = int(integer.group(1)) / 8 if integer else _SIZES.get(kind, 1)
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _group(line: str) -> int:
    """How many devices take part in one group of a collective."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", named.group(2)))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if tiled is not None:
        return int(tiled.group(1))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed.group(1).split(",")) if listed is not None else 2


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes that each device sends for a collective whose result, a device, has `size` bytes."""
    share = (group - 1) / group
    factors = {
        "all-gather": share,
        "all-reduce": 2 * share,
        "all-to-all": share,
        "reduce-scatter": group - 1,
        "collective-permute": 1.0,
    }
    return size * factors[kind]
