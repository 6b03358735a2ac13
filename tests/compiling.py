"""Tests compile for less time, where it is not users' own programs that they test."""

import os
from pathlib import Path

import jax
from jax._src import compiler

# XLA's older emitters, and one module of LLVM a program: half the time of compiling.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
USERS_OPTIONS = compiler.get_compile_options
ROOT = Path(__file__).parents[1]


def choose(quick: bool) -> None:
    """How programs of this process are compiled from now on."""
    jax.config.update("jax_disable_most_optimizations", quick)
    # In public, options can be set for one program, but not for all.
    compiler.get_compile_options = _quick_options if quick else USERS_OPTIONS


def _quick_options(*arguments, env_options_overrides=None, **more):
    options = QUICK | (env_options_overrides or {})
    return USERS_OPTIONS(*arguments, env_options_overrides=options, **more)


def environment(devices: int) -> dict[str, str]:
    """Of a process that a test starts in any directory, whose programs are compiled in the same way."""
    flags = {"xla_force_host_platform_device_count": devices} | QUICK
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(
            f"--{name}={str(value).lower()}" for name, value in flags.items()
        ),
    }
