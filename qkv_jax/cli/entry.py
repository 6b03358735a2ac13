"""Which command is meant, and how it ends.

A user's mistake ends in one line on standard error and exit code 2; nothing is lost by it.
"""

import errno
import importlib
import sys
from collections.abc import Sequence

from qkv_jax.cli.large_pages import use_large_pages
from qkv_jax.cli.parsing import PROGRAM, UsageError, nearest

USAGE = f"""usage: {PROGRAM} COMMAND ...

  train FILE [OPTIONS]           train the CONFIG of an experiment file; run again to resume
                                 (--init-from MODEL: fine-tune; --debug-nans: stop at the
                                 operation that makes a NaN)
  find-lr FILE [OPTIONS]         try learning rates on the CONFIG's data and model, and draw the loss
  evaluate MODEL... [OPTIONS]    BLEU, chrF, TER of models on held-out text; a task's own metrics
  compare A B... [OPTIONS]       which differences from the first are real: paired tests, sentences
  translate MODEL [TEXT ...]     translate arguments, a file, or standard input
  back-translate MODEL [OPTIONS] training pairs from text in the target language alone
  distil MODEL [OPTIONS]         training pairs from what a teacher makes of training sources
  score MODEL [OPTIONS]          log-probabilities that a model gives to translations
  align MODEL [OPTIONS]          word alignments of given translations, and their error rate
  plot MODEL [OPTIONS]           draw curves, attention, alignment, heads, those kept by pruning,
                                 spans, embeddings, or a page of every head (--what)
  plan FILE [OPTIONS]            memory, traffic and time of a step on a mesh, before it is rented
  import MODEL OUT               check and convert a published model: Marian (OPUS-MT), M2M100,
                                 NLLB, BART, mBART, Pegasus, T5, mT5, Flan
  export MODEL OUT --to KIND     write a model for transformers (hf) or CTranslate2 (ctranslate2)
  compress MODEL OUT --weights KIND
                                 write a model with int8 or int4 weights
  prune MODEL OUT [OPTIONS]      write a model with fewer heads, feed-forward units and layers
  average MODEL... --output OUT  write the mean of models that went on from the same weights
  demo [OPTIONS]                 train and try a small translator, about 8 minutes on 2 cores

A MODEL is the directory of a run, of an imported, published, compressed or pruned model, or a
name on the hub.
`{PROGRAM} COMMAND --help` lists the options."""

# The module of each command, imported when it is called; its function has the command's name.
COMMANDS = {
    "train": "training",
    "find-lr": "training",
    "evaluate": "evaluating",
    "compare": "evaluating",
    "translate": "translating",
    "back-translate": "made_pairs",
    "distil": "made_pairs",
    "score": "translating",
    "align": "looking",
    "plot": "looking",
    "plan": "training",
    "import": "exchange",
    "export": "exchange",
    "compress": "compressing",
    "prune": "compressing",
    "average": "compressing",
    "demo": "training",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; None: this process's."""
    whole_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if whole_process:
        use_large_pages()
    from qkv_jax.data import DataError, cache_directory
    from qkv_jax.interop import InteropError
    from qkv_jax.training import Interrupted, RunError, keep_programs

    try:
        name = arguments[0]
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
        if whole_process:
            keep_programs(cache_directory() / "programs")
        module = importlib.import_module(f"qkv_jax.cli.{COMMANDS[name]}")
        function = name.replace("-", "_") if name != "import" else "import_model"
        getattr(module, function)(arguments[1:])
    except (UsageError, DataError, InteropError, RunError, FloatingPointError) as error:
        # FloatingPointError: --debug-nans.
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"{PROGRAM}: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal
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
