import pytest

from qkv_jax.cli import main
from tests.cli.toy import train
from tests.translation import toy


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def corpus(tmp_path_factory):
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="package")
def trained(corpus, tmp_path_factory):
    """A finished run of multi30k.py with options; tests only read it."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert main(train(corpus, directory)) == 0
    return directory


@pytest.fixture
def ask(capfd):
    """Runs a command that succeeds, and returns its standard output's lines."""

    def ask(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out.splitlines()

    return ask


@pytest.fixture
def fail(capfd):
    """Runs a command that fails as a user's mistake must, and returns its message."""

    def fail(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("qkv-jax: error: ")
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        return printed.err.removeprefix("qkv-jax: error: ").strip()

    return fail
