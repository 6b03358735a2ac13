"""Commands that train, or say what training costs."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qkv_jax.cli.options import FindLr
from qkv_jax.cli.parsing import PROGRAM, UsageError, load_experiment, parse


def train(arguments: list[str]) -> None:
    if "--debug-nans" in arguments:
        import jax

        jax.config.update("jax_debug_nans", True)
        arguments = [text for text in arguments if text != "--debug-nans"]
    config = _experiment("train", arguments)
    if config is None:
        return
    from qkv_jax.training import in_directory, train_seeds, train_task

    if config.run.directory is None:
        config = in_directory(config, Path("runs") / Path(arguments[0]).stem)
    result = train_seeds(config) if config.run.seeds > 1 else train_task(config)
    print(json.dumps(result, indent=2, ensure_ascii=False))


def find_lr(arguments: list[str]) -> None:
    own, arguments = _apart(arguments, "--find.")
    asked = parse("find-lr FILE", FindLr, own, default=FindLr()).find
    config = _experiment("find-lr", arguments)
    if config is None:
        print("\nAnd --find.low, --find.high, --find.steps, --find.output.")
        return
    from qkv_jax.training import RateRange, find_rate, is_first

    try:
        rates = RateRange(low=asked.low, high=asked.high, steps=asked.steps)
    except ValueError as error:
        raise UsageError(f"--find.{error}") from error
    console = Console(stderr=True, quiet=not is_first())
    say = functools.partial(
        console.print, highlight=False, markup=False, soft_wrap=True
    )
    curve = find_rate(config, rates, say=say)
    if not is_first():
        return
    name = Path(arguments[0]).stem
    output = asked.output or Path("runs") / "find-lr" / f"{name}.png"
    _show_rates(curve, name, output)


def _show_rates(curve: Any, name: str, output: Path) -> None:
    from qkv_jax import viz

    table = Table("learning rate", "loss")
    shown = sorted({round(x) for x in np.linspace(0, len(curve.losses) - 1, 15)})
    for at in shown:
        table.add_row(f"{curve.rates[at]:.2e}", f"{curve.smoothed[at]:.4f}")
    Console().print(table)
    marks = {
        "lowest": curve.lowest,
        "steepest": curve.steepest,
        "suggested": curve.suggested,
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        viz.plot_rates(
            curve.rates, curve.losses, curve.smoothed, output, marks=marks, title=name
        )
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    if not curve.diverged:
        print("the loss has not diverged: a higher --find.high may find a lower one")
    print(
        f"lowest at {curve.lowest:.2e}, falling fastest at {curve.steepest:.2e}; drawn: {output}\n"
        f"suggested, a tenth of where it is lowest: --optimizer.peak-lr {curve.suggested:.2g}"
    )


def _apart(arguments: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """The options of a prefix with their values, and all others."""
    parts: tuple[list[str], list[str]] = ([], [])
    of_prefix = False
    for text in arguments:
        of_prefix = text.startswith(prefix) or (of_prefix and not text.startswith("--"))
        parts[0 if of_prefix else 1].append(text)
    return parts


def plan(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    config = _experiment("plan", [text for text in arguments if text != "--json"])
    if config is None:
        return
    from qkv_jax.translation import TranslationConfig

    if not isinstance(config, TranslationConfig):
        raise UsageError(f"plan is of translation; {arguments[0]} trains another task")
    mesh = config.mesh
    if -1 in (mesh.data, mesh.fsdp, mesh.context, mesh.tensor):
        mesh = dataclasses.replace(
            mesh, **{name: 1 for name, size in vars(mesh).items() if size == -1}
        )
        config = dataclasses.replace(config, mesh=mesh)
    devices = mesh.data * mesh.fsdp * mesh.context * mesh.tensor
    # Before JAX looks for devices, which it does once.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
    from qkv_jax.training.plan import this_machine
    from qkv_jax.translation.plan import plan_run, show_plan

    plan = plan_run(config)
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    more = [this_machine()] if devices == 1 else []
    for table in show_plan(plan, *more):
        Console().print(table)


def _experiment(command: str, arguments: list[str]) -> Any | None:
    """The CONFIG of the file that comes first, with the options after it; None: help was asked."""
    if arguments and not arguments[0].startswith("-"):
        config = load_experiment(Path(arguments[0]))
        return parse(
            f"{command} {arguments[0]}", type(config), arguments[1:], default=config
        )
    if arguments in (["-h"], ["--help"]):
        print(
            f"usage: {PROGRAM} {command} FILE [OPTIONS]\n\n"
            f"`{PROGRAM} {command} FILE --help` lists the options of an experiment file, such as\n"
            "experiments/translation/multi30k.py."
        )
        return None
    raise UsageError(
        f"{command} needs an experiment file, such as experiments/translation/multi30k.py"
    )


def demo(arguments: list[str]) -> None:
    from qkv_jax.training import in_directory
    from qkv_jax.translation.demo import CONFIG, run_demo

    config = parse(
        "demo", type(CONFIG), arguments, default=in_directory(CONFIG, Path("runs/demo"))
    )
    called = sys.argv[0]
    program = called if Path(called).name == PROGRAM else "python -m qkv_jax"
    run_demo(config, console=Console(), program=program)
