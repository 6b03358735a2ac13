from pathlib import Path

import pytest

from qkv_jax.translation import Translator, load_run
from tests.translation import toy


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def corpus(tmp_path_factory) -> Path:
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="package")
def finished(corpus, tmp_path_factory) -> Path:
    """The directory of a finished run of `toy.make_config`; tests only read it."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    toy.run(toy.make_config(corpus, directory), draws=True)
    return directory


@pytest.fixture(scope="package")
def translator(finished) -> Translator:
    return load_run(finished)
