"""When the command line starts itself anew for large pages, and with what."""

import os
import platform
import sys

import pytest

from qkv_jax.cli.large_pages import use_large_pages

LEFT_TO_PROGRAMS, FOR_ALL = "always [madvise] never\n", "[always] madvise never\n"


@pytest.fixture
def started(monkeypatch):
    """What would have been started."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "qkv_jax", "demo"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return calls


@pytest.fixture
def switch(tmp_path):
    path = tmp_path / "enabled"
    path.write_text(LEFT_TO_PROGRAMS)
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_the_same_command_is_started_with_large_pages(
    before, after, started, switch, monkeypatch
):
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    use_large_pages(switch)
    ((program, arguments, environment),) = started
    assert (program, arguments[1:]) == (sys.executable, ["-m", "qkv_jax", "demo"])
    assert environment["GLIBC_TUNABLES"] == after
    assert environment["PATH"] == os.environ["PATH"]


def test_it_is_started_once(started, switch, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    use_large_pages(switch)
    assert not started


def test_nothing_is_started_where_it_would_not_help(started, switch, monkeypatch):
    switch.write_text(FOR_ALL)
    use_large_pages(switch)
    use_large_pages(switch.with_name("missing"))
    switch.write_text(LEFT_TO_PROGRAMS)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    use_large_pages(switch)
    assert not started
