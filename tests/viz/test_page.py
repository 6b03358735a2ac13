import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from qkv_jax import viz

NASTY = '</script><script>alert("x")</script><!-- \' & {{data}} \u2028 مرحبا \ud800'


class Reader(HTMLParser):
    """The elements of a page, and the text of each script by its id."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.scripts, self._id = [], [], {}, None
        self.title = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._id = dict(attrs).get("id", "code") if tag == "script" else tag

    def handle_endtag(self, tag):
        self._id = None

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and self._id:
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
        if self._id == "title":
            self.title += data


def _layers(heads=2, asks=("a", "b", NASTY), seen=("x", "y")):
    weights = np.random.default_rng(0).dirichlet(np.ones(len(seen)), (heads, len(asks)))
    own = np.random.default_rng(1).dirichlet(np.ones(len(seen)), (heads, len(seen)))
    return {
        "encoder.0.attention": viz.Heads(own, seen, seen),
        "decoder.0.cross": viz.Heads(weights, asks, seen),
        "decoder.1.cross": viz.Heads(weights[::-1], asks, seen),
    }


def _read(path):
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    return reader, json.loads(reader.scripts["data"])


def test_the_page_holds_every_head_to_three_digits(tmp_path):
    layers = _layers()
    viz.write_page(layers, tmp_path / "page.html", title="a sentence")
    _, data = _read(tmp_path / "page.html")
    kinds = [kind["name"] for kind in data["kinds"]]
    assert kinds == ["encoder self-attention", "cross-attention"]
    for kind in data["kinds"]:
        for layer in kind["layers"]:
            weights = layers[layer["name"]].weights
            levels = np.frombuffer(base64.b64decode(layer["weights"]), "<u2")
            assert layer["heads"] == len(weights)
            found = levels.reshape(weights.shape) / 65535
            np.testing.assert_allclose(found, weights, atol=1e-5)


def test_any_text_stays_text(tmp_path):
    viz.write_page(_layers(), tmp_path / "nasty.html", title=NASTY)
    viz.write_page(_layers(asks="abc"), tmp_path / "plain.html", title="plain")
    (nasty, data), (plain, _) = (
        _read(tmp_path / f"{name}.html") for name in ("nasty", "plain")
    )
    spelled = NASTY.replace("\u2028", "\\u2028").replace("\ud800", "\\ud800")
    assert nasty.tags == plain.tags
    assert data["kinds"][1]["asks"] == ["a", "b", spelled]
    assert data["title"] == nasty.title == spelled


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    viz.write_page(_layers(), tmp_path / "page.html", title="a")
    text = (tmp_path / "page.html").read_text("utf-8")
    reader, _ = _read(tmp_path / "page.html")
    assert not {"src", "href", "srcset"} & set(reader.attributes)
    assert not re.search(r"https?:|url\(|@import|\bimport\b|fetch\(|innerHTML", text)
    assert "default-src 'none'" in text


def test_many_heads_of_a_long_sentence_take_less_than_two_megabytes(tmp_path):
    tokens = [f"▁token{i}" for i in range(40)]
    heads = viz.Heads(np.full((8, 40, 40), 1 / 40), tokens, tokens)
    sides = ("encoder.{}.attention", "decoder.{}.attention", "decoder.{}.cross")
    layers = {side.format(i): heads for side in sides for i in range(6)}
    viz.write_page(layers, tmp_path / "page.html", title="a")
    assert (tmp_path / "page.html").stat().st_size < 2e6


def test_the_script_is_javascript(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    viz.write_page(_layers(), tmp_path / "page.html", title=NASTY)
    reader, _ = _read(tmp_path / "page.html")
    (tmp_path / "page.js").write_text(reader.scripts["code"], "utf-8")
    command = [node, "--check", str(tmp_path / "page.js")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "layers, expected",
    [
        ({}, "layers must hold at least one"),
        (
            {"decoder.cross": viz.Heads(np.ones((2, 3)), "abc", "ab")},
            r"T = 3 and S = 2",
        ),
        (
            _layers() | {"decoder.2.cross": viz.Heads(np.ones((1, 3, 2)), "abc", "xz")},
            "decoder.2.cross has other tokens than decoder.0.cross",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path, layers, expected):
    with pytest.raises(ValueError, match=expected):
        viz.write_page(layers, tmp_path / "page.html", title="a")
    assert not (tmp_path / "page.html").exists()
