"""What published checkpoints lack, or have beside what they need."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qkv_jax.interop import InteropError, load, read_tensors, save
from tests.peers.test_pretrained import run_ours

pytestmark = pytest.mark.peers

SIZES = {
    "vocab_size": 31,
    "d_model": 12,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 5,
    "decoder_ffn_dim": 7,
    "max_position_embeddings": 20,
    "decoder_start_token_id": 2,
}


def logits(model, source, target):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(source).long(),
            decoder_input_ids=torch.tensor(target).long(),
        ).logits.numpy()


@pytest.mark.parametrize("name", ["Bart", "MBart"])
def test_a_checkpoint_of_the_model_without_its_output(name, tmp_path):
    """facebook/bart-large: names without "model.", no bias of the output."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    bare = getattr(transformers, f"{name}Model")(config)
    bare.save_pretrained(tmp_path / "in")
    theirs = getattr(transformers, f"{name}ForConditionalGeneration")
    model = theirs.from_pretrained(tmp_path / "in").eval()
    source, target = np.random.default_rng(0).integers(4, 31, (2, 3, 7), np.int32)
    wanted, ours = logits(model, source, target), load(tmp_path / "in")
    found = run_ours(ours.model(), source, target)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    save(ours, tmp_path / "out")
    before, after = (read_tensors(tmp_path / x) for x in ("in", "out"))
    assert {x: y.tobytes() for x, y in before.items()} == {
        x: y.tobytes() for x, y in after.items()
    }


def test_mbart_may_leave_the_start_to_the_language(tmp_path):
    """facebook/mbart-large-cc25 names none."""
    config = transformers.MBartConfig(**SIZES | {"decoder_start_token_id": None})
    transformers.MBartForConditionalGeneration(config).save_pretrained(tmp_path)
    assert load(tmp_path).start is None


def test_an_unused_bias_of_published_t5_is_kept_and_changes_nothing(tmp_path):
    config = transformers.T5Config(
        vocab_size=31, d_model=12, d_kv=4, d_ff=5, num_layers=2, num_heads=3
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state = model.state_dict() | {name: torch.randn(32, 3)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load(tmp_path)
    assert list(ours.kept) == [name]
    source, target = np.random.default_rng(0).integers(4, 31, (2, 3, 7), np.int32)
    wanted = logits(model, source, target)
    found = run_ours(ours.model(), source, target)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    torch.save(state | {"odd": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InteropError, match="tensor odd is not used"):
        load(tmp_path)
