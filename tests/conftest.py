"""Every test runs on 8 simulated CPU devices, and a silent rank promotion is an error."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """What one test compiles, all others of this session have: most of a test is compiling."""
    place = getattr(config, "workerinput", {}).get("programs")
    if place is None:
        temporary = tempfile.TemporaryDirectory(prefix="qkv-jax-programs-")
        config.add_cleanup(temporary.cleanup)
        place = temporary.name
    config.programs = place
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Of pytest-xdist: its processes share the place."""
    node.workerinput["programs"] = node.config.programs


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Programs are compiled as users have them where that is what is tested; else for less time."""
    as_users_have_them = item.path.name in AS_USERS_HAVE_THEM
    jax.config.update("jax_disable_most_optimizations", not as_users_have_them)


AS_USERS_HAVE_THEM = {
    "test_attention.py",
    "test_blockwise.py",
    "test_context_parallel.py",
    "test_loop.py",
    "test_mesh.py",
    "test_plan.py",
    "test_step.py",
}
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of corpora beside the checkout; a test that needs it skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the corpora in {SHARED}")
    return SHARED
