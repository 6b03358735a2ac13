"""Where does each mesh axis stop paying, for `base` and `big`, at lengths of 512 and 32,768?

    python -m benchmarks.plans

Calls `qkv-jax plan` for eight simulated devices along one axis at a time, with 65,536 target tokens
an update in bfloat16, and reads off what a device sends. All four axes send an amount that grows as
(n - 1) / n with n devices, while a device's share of the work falls as 1 / n: so they meet at one
n, from which on a step takes what its messages take. No chip is needed, and none is measured.
"""

import json
import subprocess
import sys
from typing import Any

import tyro

MODELS = {"base": (512, 2048, 8), "big": (1024, 4096, 16)}
AXES = ("data", "fsdp", "tensor", "context")
TOKENS = 65_536
DEVICES = 8


def plan(model: str, length: int, axis: str) -> dict[str, Any]:
    """What `qkv-jax plan` says."""
    width, inner, heads = MODELS[model]
    options = {
        "model.d-model": width,
        "model.d-ff": inner,
        "model.heads": heads,
        "model.encoder-layers": 6,
        "model.decoder-layers": 6,
        "model.dtype": "bfloat16",
        "text.vocabulary": 32_000,
        "text.max-source": length,
        "text.max-target": length,
        "text.batch-tokens": max(TOKENS, length * (DEVICES if axis in AXES[:2] else 1)),
        "optimizer.name": "adamw",
        "mesh.data": 1,
        f"mesh.{axis}": DEVICES,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "qkv_jax", "plan"]
    command += ["experiments/translation/multi30k.py", "--text.no-packing"]
    command += [*flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main(
    *,
    models: tuple[str, ...] = ("base", "big"),
    lengths: tuple[int, ...] = (512, 32_768),
    axes: tuple[str, ...] = AXES,
    hardware: str = "H100",
) -> None:
    """Prints a row for each model, length and axis.

    Args:
        models: "base", "big".
        lengths: of source and target.
        axes: of the mesh.
        hardware: a name that `qkv-jax plan` knows.
    """
    names = ["model", "length", f"axis of {DEVICES}", "tokens", "a device holds"]
    names += ["and sends a step", "compute, ms", "network, ms", "they meet at n"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)
    for model in models:
        for length in lengths:
            for axis in axes:
                found = plan(model, length, axis)
                estimate = found["estimates"][hardware]
                held = sum(found["held"].values()) / 1e9
                sent = sum(x["bytes"] for x in found["collectives"].values()) / 1e9
                alone = estimate["compute"] * DEVICES
                most = estimate["network"] * DEVICES / (DEVICES - 1)
                row = (
                    *(model, f"{length:,}", axis, f"{found['tokens']:,}"),
                    *(f"{held:.1f} GB", f"{sent:.2f} GB"),
                    f"{estimate['compute'] * 1e3:.1f}",
                    f"{estimate['network'] * 1e3:.1f}",
                    f"{alone / most:.1f}",
                )
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
