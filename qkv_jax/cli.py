"""The command line: train, evaluate, translate, plot, plan, demo.

A user's mistake ends in one line on standard error and exit code 2; nothing is lost by it.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

PROGRAM = "qkv-jax"
USAGE = f"""usage: {PROGRAM} COMMAND ...

  train FILE [OPTIONS]           train the CONFIG of an experiment file; run again to resume
                                 (--debug-nans: stop at the operation that makes a NaN)
  evaluate RUN [OPTIONS]         BLEU and chrF of a run on held-out text
  translate RUN [TEXT ...]       translate arguments, a file, or standard input
  plot RUN [OPTIONS]             draw a run's curves and attention
  plan FILE [OPTIONS]            memory, traffic and time of a step on a mesh, before it is rented
  demo [OPTIONS]                 train and try a small translator, about 8 minutes on 2 cores

`{PROGRAM} COMMAND --help` lists the options."""


class UsageError(ValueError):
    """The command line is wrong; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """BLEU and chrF of a run on held-out text, with sacreBLEU's signatures.

    Attributes:
        run: directory of the run.
        split: part of the run's own corpus.
        source, reference: files to evaluate on instead, one sentence a line.
        checkpoint: a step, "best", "latest" or "average"; default as the run is configured.
        beams: hypotheses kept in the search.
        alpha: of the length penalty.
        output: file for the translations, one a line.
        json: print one JSON object.
    """

    run: tyro.conf.Positional[Path]
    split: Literal["test", "valid"] = "test"
    source: Path | None = None
    reference: Path | None = None
    checkpoint: str | None = None
    beams: int | None = None
    alpha: float | None = None
    output: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate:
    """Translates sentences with a run: arguments, a file, or standard input, a line each.

    Attributes:
        run: directory of the run.
        text: sentences; none: lines of --input or of standard input.
        input: file to translate.
        output: file for the translations; default standard output.
        n_best: translations of each sentence, with their scores.
        json: a JSON line for each sentence: source and translations with scores.
        checkpoint: a step, "best", "latest" or "average"; default as the run is configured.
        beams: hypotheses kept in the search.
        alpha: of the length penalty.
    """

    run: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    input: Path | None = None
    output: Path | None = None
    n_best: int = 1
    json: bool = False
    checkpoint: str | None = None
    beams: int | None = None
    alpha: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Draws curves.png and attention.png of a run.

    Attributes:
        run: directory of the run.
        text: sentence whose attention is drawn; default one of the held-out text.
        layer: attention layer, such as decoder.0.cross or encoder.1.attention.
        output: directory for the pictures; default the run's.
    """

    run: tyro.conf.Positional[Path]
    text: str | None = None
    layer: str | None = None
    output: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "translate": _translate,
        "plot": _plot,
        "plan": _plan,
        "demo": _demo,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    from qkv_jax.data import DataError
    from qkv_jax.training import Interrupted, RunError

    try:
        command = commands.get(arguments[0])
        if command is None:
            raise UsageError(
                f"unknown command {arguments[0]!r}{_nearest(arguments[0], commands)}"
            )
        command(arguments[1:])
    except (UsageError, DataError, RunError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"{PROGRAM}: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal
    except FloatingPointError as error:  # --debug-nans
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"{PROGRAM}: error: no space is left ({error.filename or 'disk full'}): make some; "
            "complete checkpoints are whole, and the same command goes on from the last",
            file=sys.stderr,
        )
        return 2
    except SystemExit as ended:  # --help
        if ended.code:
            raise
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def _train(arguments: list[str]) -> None:
    if "--debug-nans" in arguments:
        import jax

        jax.config.update("jax_debug_nans", True)
        arguments = [text for text in arguments if text != "--debug-nans"]
    config = _experiment("train", arguments)
    if config is None:
        return
    from qkv_jax.translation import train_run
    from qkv_jax.translation.demo import in_directory

    if config.run.directory is None:
        config = in_directory(config, Path("runs") / Path(arguments[0]).stem)
    result = train_run(config)
    print(json.dumps(result, indent=2, ensure_ascii=False))


def _plan(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    config = _experiment("plan", [text for text in arguments if text != "--json"])
    if config is None:
        return
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
        config = _load_experiment(Path(arguments[0]))
        return _parse(
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


def _demo(arguments: list[str]) -> None:
    from qkv_jax.translation.demo import CONFIG, in_directory, run_demo

    config = _parse(
        "demo", type(CONFIG), arguments, default=in_directory(CONFIG, Path("runs/demo"))
    )
    called = sys.argv[0]
    program = called if Path(called).name == PROGRAM else "python -m qkv_jax"
    run_demo(config, console=Console(), program=program)


def _evaluate(arguments: list[str]) -> None:
    options = _parse("evaluate", Evaluate, arguments)
    from qkv_jax.data import read_pairs
    from qkv_jax.translation import evaluate_run
    from qkv_jax.translation.run import read_run

    _check_search(options)
    if (options.source is None) != (options.reference is None):
        raise UsageError("--source and --reference go together")
    translator = _load(options)
    if options.source is not None:
        pairs = read_pairs(options.source, options.reference)
    else:
        pairs = getattr(read_run(options.run).data.load(), options.split)
    if not pairs:
        raise UsageError(
            f"the run's corpus has no {options.split} part: give --source and --reference"
        )
    scores, translations = evaluate_run(translator, pairs)
    if options.output is not None:
        _write_lines(options.output, translations)
    if options.json:
        print(json.dumps(scores.to_json()))
        return
    for name, signature in scores.signatures.items():
        print(f"{name:>20} {getattr(scores, name):6.2f}   {signature}")
    print(f"{'length_ratio':>20} {scores.length_ratio:6.3f}   {len(pairs):,} sentences")


def _translate(arguments: list[str]) -> None:
    options = _parse("translate", Translate, arguments)
    from qkv_jax.translation.run import read_run

    _check_search(options)
    if options.n_best < 1:
        raise UsageError(f"--n-best must be at least 1; got {options.n_best}")
    if options.text and options.input is not None:
        raise UsageError("give sentences as arguments or by --input, not both")
    if options.beams is not None and options.n_best > options.beams:
        raise UsageError(f"--n-best {options.n_best} needs --beams of at least that")
    sentences = list(options.text) or _read_lines(options.input)
    for number, sentence in enumerate(sentences, 1):
        if not _is_unicode(sentence):
            raise UsageError(f"sentence {number} is not UTF-8: {sentence!r}")
    if options.beams is None and options.n_best > 1:
        usual = read_run(options.run).decoding.beams
        options = dataclasses.replace(options, beams=max(usual, options.n_best))
    translator = _load(options)
    found = translator(sentences, n_best=options.n_best)
    cut = translator.too_long(sentences)
    if cut:
        print(
            f"{PROGRAM}: {cut} of {len(sentences)} sentences were longer than "
            f"{translator.lengths[-1]} tokens and were cut",
            file=sys.stderr,
        )
    pairs = zip(sentences, found)
    _write_lines(options.output, [line for p in pairs for line in _shown(*p, options)])


def _shown(source: str, translations: list[Any], options: Translate) -> list[str]:
    """The lines of output for one sentence."""
    if options.json:
        content = [translation._asdict() for translation in translations]
        row = {"source": source, "translations": content}
        return [json.dumps(row, ensure_ascii=False)]
    if options.n_best > 1:
        return [f"{found.score:.4f}\t{found.text}" for found in translations]
    return [translations[0].text]


def _plot(arguments: list[str]) -> None:
    options = _parse("plot", Plot, arguments)
    from qkv_jax import viz
    from qkv_jax.translation import load_run
    from qkv_jax.translation.run import draw_attention, read_run

    output = options.output or options.run
    translator = load_run(options.run)
    names = translator.attention_layers
    if options.layer is not None and options.layer not in names:
        raise UsageError(f"no layer {options.layer!r}{_nearest(options.layer, names)}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        viz.plot_curves(options.run / "metrics.jsonl", output / "curves.png")
    except (OSError, ValueError) as error:
        raise UsageError(f"the run's curves cannot be drawn: {error}") from error
    text = options.text
    if text is None:
        corpus = read_run(options.run).data.load()
        text = (corpus.test or corpus.valid or corpus.train)[0][0]
    draw_attention(translator, text, output / "attention.png", layer=options.layer)
    print(f"{output / 'curves.png'}\n{output / 'attention.png'}")


def _check_search(options: Evaluate | Translate) -> None:
    if options.beams is not None and options.beams < 1:
        raise UsageError(f"--beams must be at least 1; got {options.beams}")
    if options.alpha is not None and not math.isfinite(options.alpha):
        raise UsageError(f"--alpha must be finite; got {options.alpha}")


def _load(options: Evaluate | Translate) -> Any:
    from qkv_jax.translation import load_run

    checkpoint: Any = options.checkpoint
    if checkpoint is not None and checkpoint not in ("best", "latest", "average"):
        if not checkpoint.isdecimal():
            raise UsageError(
                "--checkpoint must be a step, 'best', 'latest' or 'average'; "
                f"got {checkpoint!r}"
            )
        checkpoint = int(checkpoint)
    return load_run(
        options.run, checkpoint=checkpoint, beams=options.beams, alpha=options.alpha
    )


def _load_experiment(path: Path) -> Any:
    """The CONFIG of an experiment file."""
    if not path.is_file():
        files = [*Path("experiments").rglob("*.py"), *path.parent.glob("*.py")]
        there = {file.name: file for file in files}
        near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
        hint = f": did you mean {there[near[0]]}?" if near else ""
        raise UsageError(f"there is no experiment file {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{path} cannot be loaded: {error}") from error
    config = getattr(module, "CONFIG", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"{path} defines no CONFIG")
    return config


def _parse(name: str, kind: Any, arguments: list[str], default: Any = None) -> Any:
    """The options of a command, typed by tyro; a mistake is one line."""
    known = ["--help", *_options(kind, default)]
    for argument in itertools.takewhile(lambda text: text != "--", arguments):
        option = argument.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            raise UsageError(f"unknown option {option}{_nearest(option, known)}")
    printed = io.StringIO()
    keywords = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind,
                prog=f"{PROGRAM} {name}",
                args=arguments,
                config=(tyro.conf.AvoidSubcommands,),
                **keywords,
            )
    except SystemExit as error:
        if not error.code:
            raise
        message = _one_line(printed.getvalue())
        own = f"Error parsing {kind.__name__}: "
        raise UsageError(message.removeprefix(own)) from None
    except ValueError as error:
        raise UsageError(str(error)) from error


def _options(kind: Any, default: Any, prefix: str = "") -> Iterable[str]:
    """The options of a dataclass: --steps, --training.steps of nested ones, --no-exact."""
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        value = getattr(default, field.name, field.default)
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            if isinstance(value, bool):
                yield f"--{prefix}no-{name}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""


def _one_line(text: str) -> str:
    """What tyro's boxed message says first: up to a blank line, or a rule within the box."""
    lines = [line.strip("│ ") for line in text.strip().splitlines()[1:]]
    rules = "─╰╯-"
    body = itertools.dropwhile(lambda line: not line.strip(rules), lines)
    said = itertools.takewhile(lambda line: line.strip(rules), body)
    return " ".join(said) or " ".join(text.split())


def _is_unicode(text: str) -> bool:
    """False for an argument of other bytes, which Python hands on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(path: Path | None) -> list[str]:
    """Lines of a UTF-8 file or of standard input; only a line feed ends a line."""
    from qkv_jax.data import DataError

    name = "standard input" if path is None else str(path)
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: not UTF-8 ({error.reason})"
            ) from error
    return texts


def _write_lines(path: Path | None, lines: Sequence[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    if path is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
