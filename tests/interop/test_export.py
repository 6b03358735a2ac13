"""Models trained here as checkpoints: read back they are the same, or an error says why not."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax.interop import InteropError, load
from qkv_jax.interop.ctranslate2 import Vocabularies, export_ctranslate2
from qkv_jax.interop.directory import new_directory
from qkv_jax.interop.export import generation_settings, to_huggingface
from qkv_jax.interop.pretrained import save
from qkv_jax.interop.trained import Trained
from qkv_jax.layers import init_rngs
from qkv_jax.models.seq2seq import Config, Model

SIZES = {"d_model": 12, "d_ff": 7, "heads": 3, "encoder_layers": 2, "decoder_layers": 1}
T5 = {
    "normalisation": "rms",
    "bias": False,
    "attention_scale": 1.0,
    "positions": "relative",
}
LEARNED = {"positions": "learned", "embedding_norm": True, "max_positions": 9}
CASES = {
    "marian": {"norm": "post", "tie": "target", "source_vocabulary": 13},
    "pegasus": {"norm": "pre", "tie": "none"},
    "m2m_100": {"norm": "pre", "positions": "sinusoid_inclusive", "position_offset": 1},
    "bart": {"norm": "post", "tie": "input", **LEARNED},
    "mbart": {"norm": "pre", "kv_heads": 1, **LEARNED},
    "t5": {"norm": "pre", "gated": True, "embedding_scale": False, **T5},
}


def make(**changes) -> Trained:
    config = Config(vocabulary=17, **SIZES, **changes)
    init = jax.jit(lambda: nnx.state(Model(config, rngs=init_rngs(0)), nnx.Param))
    rng = np.random.default_rng(0)

    def noisy(x):
        return np.float32(np.asarray(x) + 0.1 * rng.normal(size=x.shape))

    return Trained(config=config, params=jax.tree.map(noisy, init()))


@nnx.jit
def run(module, source, target):
    return module(source, target)


@pytest.mark.parametrize("family", CASES)
def test_what_is_written_is_read_as_the_same_model(family, tmp_path):
    model = make(**CASES[family])
    save(to_huggingface(model), tmp_path)
    again = load(tmp_path)
    assert again.family == family
    assert (again.start, again.eos, again.first) == (1, 2, None)
    rng = np.random.default_rng(1)
    source = rng.integers(3, 13, (2, 5), np.int32)
    source[1, 3:] = 0
    target = rng.integers(1, 17, (2, 4), np.int32)
    wanted = run(model.model(), source, target)
    np.testing.assert_allclose(
        run(again.model(), source, target), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gated": True}, ["gated = False"]),
        ({"epsilon": 1e-6}, ["epsilon = 1e-05"]),
        ({"head_size": 5}, ["encoder heads of size = 4"]),
        ({"normalisation": "rms", "gated": True}, ["gated = False", "normalisation"]),
        ({"norm": "pre", "tie": "target", "source_vocabulary": 13}, ["norm = 'post'"]),
    ],
)
def test_what_no_family_expresses_is_listed(changes, named):
    with pytest.raises(InteropError) as caught:
        to_huggingface(make(**changes))
    for text in named:
        assert text in str(caught.value)


def test_a_search_is_written_in_the_words_of_transformers():
    settings = generation_settings(
        make(), beams=5, alpha=0.6, max_length=40, forbidden=(3,)
    )
    assert settings["suppress_tokens"] == [0, 1, 3]
    assert settings["max_length"] == 41
    assert settings["early_stopping"] == "never"
    assert (settings["decoder_start_token_id"], settings["eos_token_id"]) == (1, 2)


def test_nothing_is_left_of_what_was_begun(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out") as building:
        (building / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_stays_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(InteropError, match="not empty"), new_directory(tmp_path):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}


def test_a_missing_engine_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(InteropError, match=r"pip install qkv-jax\[export\]"):
        export_ctranslate2(make(), Vocabularies([], []), tmp_path / "out")
