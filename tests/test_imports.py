"""The import rule: who may import whom, and what nobody may. Read from the source, never run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qkv_jax"
TREES = [ROOT / name for name in ("qkv_jax", "experiments", "benchmarks", "tests")]

# Part of the package -> the other parts it may import; a new part must be added here.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "layers": {"ops"},
    "models": {"ops", "layers"},
    "decoding": {"ops"},
    "training": {"ops"},
    "compression": {"ops", "layers"},
    "interop": {"ops", "layers", "models", "decoding"},
    "data": set(),
    "viz": set(),
    "__init__": {"translation"},
}
UNRESTRICTED = {"cli", "__main__", "tasks", "translation"}
JAX = {"jax", "jaxlib", "flax", "optax", "chex", "orbax"}
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
OUTSIDE = {"experiments", "benchmarks", "tests"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that `tree` imports, at any depth; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name, first = ast.unparse(node.func), node.args[0]
            dynamic = name == "__import__" or name.endswith("import_module")
            if (
                dynamic
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                yield first.value


def forbidden_import(part: str, name: str) -> str | None:
    """Why the part of the package may not import `name`; None: it may."""
    top, *rest = name.split(".")
    if not top:
        return f"imports {name}: imports are absolute"
    if top in PICKLES:
        return f"imports {name}: loading a pickle runs code"
    if top in OUTSIDE:
        return f"imports {name}, which is not in the wheel"
    if part == "data" and top in JAX:
        return f"imports {name}: data knows no jax"
    if top != "qkv_jax" or part in UNRESTRICTED or rest[:1] == ["__version__"]:
        return None
    if rest and rest[0] in ALLOWED[part] | {part}:
        return None
    return f"imports {name}; {part} may import {sorted(ALLOWED[part]) or 'nothing of ours'}"


def forbidden_calls(tree: ast.AST) -> Iterator[str]:
    """Ways to unpickle that no import shows: `torch.load`, and `allow_pickle=True`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield "uses torch.load: it unpickles"
        if isinstance(node, ast.keyword) and ast.unparse(node) == "allow_pickle=True":
            yield "passes allow_pickle=True"


def violations(path: str, source: str) -> list[str]:
    """What the module at `path`, relative to the package, does that it may not."""
    part = Path(path).parts[0].removesuffix(".py")
    if part not in ALLOWED.keys() | UNRESTRICTED:
        return [f"{path}: {part} has no line in ALLOWED"]
    tree = ast.parse(source, path)
    reasons = [forbidden_import(part, name) for name in imported_names(tree)]
    return [f"{path}: {why}" for why in [*reasons, *forbidden_calls(tree)] if why]


def uses_experimental(source: str) -> bool:
    """Whether a module touches `jax.experimental`, imported or as an attribute."""
    tree = ast.parse(source)
    attributes = (
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    )
    names = [*imported_names(tree), *attributes]
    return any(f"{name}.".startswith("jax.experimental.") for name in names)


def has_vague_name(path: Path) -> bool:
    """Whether a file or folder is named after nothing in particular."""
    return any(part.removesuffix(".py").strip("_") in VAGUE for part in path.parts)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_downwards_only(module):
    assert violations(str(module.relative_to(PACKAGE)), module.read_text("utf-8")) == []


def test_jax_experimental_is_wrapped_in_one_place():
    users = [
        str(module)
        for module in MODULES
        if uses_experimental(module.read_text("utf-8"))
    ]
    assert len(users) <= 1, users


def test_no_module_is_named_after_nothing():
    names = [path.relative_to(ROOT) for tree in TREES for path in tree.rglob("*.py")]
    assert [str(name) for name in names if has_vague_name(name)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/a.py", "import qkv_jax.layers"),
        ("ops/a.py", "from qkv_jax import layers"),
        ("ops/a.py", "import qkv_jax"),
        ("ops/a.py", "from .masks import Mask"),
        ("layers/a.py", "from qkv_jax.models.seq2seq import Config"),
        ("models/a.py", "from qkv_jax import ops, training"),
        ("decoding/a.py", "def f():\n    from qkv_jax.models import seq2seq"),
        ("training/a.py", "import importlib\nimportlib.import_module('qkv_jax.data')"),
        ("compression/a.py", "from qkv_jax.models import seq2seq"),
        ("interop/a.py", "from qkv_jax.training import RunError"),
        ("data/a.py", "import jax.numpy as jnp"),
        ("data/a.py", "from flax import nnx"),
        ("viz.py", "from qkv_jax.ops import masks"),
        ("__init__.py", "from qkv_jax import ops"),
        ("cli/a.py", "from experiments.translation import multi30k"),
        ("cli/a.py", "import pickle"),
        ("interop/a.py", "import torch\ntorch.load('model.bin')"),
        ("data/a.py", "import numpy as np\nnp.load('a.npy', allow_pickle=True)"),
        ("newcomer/a.py", ""),
    ],
)
def test_the_rule_catches(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/a.py", "import jax\nfrom qkv_jax.ops.masks import Mask"),
        ("models/a.py", "from qkv_jax import layers, ops"),
        ("data/a.py", "import numpy as np\nnp.load('a.npy', allow_pickle=False)"),
        ("cli/a.py", "from qkv_jax import __version__, data, models, training"),
        (
            "translation.py",
            "from qkv_jax.data import DataError\nfrom qkv_jax.models import seq2seq",
        ),
    ],
)
def test_the_rule_admits(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from jax.experimental import pallas", True),
        ("from jax import experimental", True),
        ("import jax\njax.experimental.enable_x64()", True),
        ("import jax\nfrom jax import numpy as jnp", False),
    ],
)
def test_experimental_is_seen_however_it_is_written(source, expected):
    assert uses_experimental(source) is expected


def test_vague_names_are_seen():
    assert has_vague_name(Path("qkv_jax/ops/_utils.py"))
    assert has_vague_name(Path("qkv_jax/common/masks.py"))
    assert not has_vague_name(Path("qkv_jax/ops/masks.py"))


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that runs `code` in the checkout."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_else():
    heavy = JAX | {"numpy", "matplotlib", "grain"}
    assert run_python(f"import sys, qkv_jax; print(*{heavy} & set(sys.modules))") == ""


def test_importing_every_module_starts_no_device():
    names = [
        ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for module in MODULES
    ]
    # jax refuses a number of devices once a device is started: an array at import time would.
    run_python(
        "import importlib, jax\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "jax.config.update('jax_num_cpu_devices', 3)"
    )
