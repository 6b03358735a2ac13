"""A Marian toolkit's file of the numbers of a model of `transformers` computes what that does."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qkv_jax.interop import load
from qkv_jax.interop.marian_npz import convert_marian
from tests.interop import toy_marian
from tests.peers.test_pretrained import run_ours

pytestmark = pytest.mark.peers

PARTS = {"self_attn": "self", "encoder_attn": "context"}


def marian_name(name: str) -> str:
    """The toolkit's name of a tensor of a layer."""
    side, layer, rest = re.fullmatch(
        r"model\.(\w+)\.layers\.(\d+)\.(.+)", name
    ).groups()
    stem = f"{side}_l{int(layer) + 1}"
    kind = {"weight": "W", "bias": "b"}[rest.rpartition(".")[2]]
    scale = {"weight": "scale", "bias": "bias"}[rest.rpartition(".")[2]]
    if match := re.match(r"fc(\d)", rest):
        return f"{stem}_ffn_{kind}{match[1]}"
    if rest.startswith("final_layer_norm"):
        return f"{stem}_ffn_ffn_ln_{scale}"
    part = PARTS["_".join(rest.split("_")[:2]).split(".")[0]]
    if "layer_norm" in rest:
        return f"{stem}_{part}_Wo_ln_{scale}"
    letter = re.search(r"\.(\w)\w*_proj", rest)[1]
    return f"{stem}_{part}_{kind}{letter}"


def test_logits_are_theirs(tmp_path):
    rng = np.random.default_rng(0)
    V = toy_marian.vocabulary(tmp_path)
    options = toy_marian.options(V)
    arrays = toy_marian.arrays(rng, options)
    config = transformers.MarianConfig(
        vocab_size=V + 1,
        d_model=12,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=V,
        decoder_start_token_id=V,
        eos_token_id=0,
    )
    theirs = transformers.MarianMTModel(config).eval()
    fill(theirs, arrays)
    toy_marian.write(tmp_path, options, arrays)
    convert_marian(tmp_path, tmp_path / "out")
    source, target = rng.integers(0, V, (2, 3, 7)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(source).long(),
            decoder_input_ids=torch.tensor(target).long(),
        ).logits.numpy()
    found = run_ours(load(tmp_path / "out").model(), source, target)
    limit = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(found[..., :V], wanted[..., :V], atol=limit, rtol=0)


def fill(theirs, arrays) -> None:
    """Puts the toolkit's numbers into a model of theirs."""
    padded = np.pad(arrays["Wemb"], ((0, 1), (0, 0)))
    bias = np.pad(arrays["decoder_ff_logit_out_b"], ((0, 0), (0, 1)))
    with torch.no_grad():
        theirs.model.shared.weight.copy_(torch.tensor(padded))
        theirs.final_logits_bias.copy_(torch.tensor(bias))
        for name, x in theirs.named_parameters():
            if ".layers." in name:
                x.copy_(torch.tensor(arrays[marian_name(name)].T).reshape(x.shape))
