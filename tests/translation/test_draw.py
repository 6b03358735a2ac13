import dataclasses

from qkv_jax.layers import AttentionKind
from qkv_jax.models import seq2seq
from qkv_jax.translation import Translator, draw
from qkv_jax.translation.models import init_params


def _of(translator, config):
    """A new model in the place of a translator's."""
    params = init_params(config, seed=0)
    parts = (config, params, translator.tokenizer)
    return Translator(*parts, decoding=translator.decoding, mesh=translator.mesh)


def test_learned_spans_stand_beside_the_distances(translator, tmp_path):
    kind = AttentionKind(name="adaptive_span", longest=20)
    config = dataclasses.replace(translator.config, encoder_attention=kind)
    learned = _of(translator, config)
    pairs = [("one two three", "three two one"), ("six", "six")]
    counts = draw.count_tokens(learned, pairs)
    heads = draw.measure_heads(learned, pairs, counts)
    figure = draw.draw_spans(learned, heads, tmp_path / "spans.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes[:3]]
    # Spans begin at half of the longest.
    assert [text.split("\n")[1] for text in texts[0]] == ["span 10"] * 2
    assert not any("span" in text for text in texts[1] + texts[2])


def test_a_table_for_each_side_is_drawn_by_itself(translator, tmp_path):
    size = translator.config.vocabulary
    config = dataclasses.replace(translator.config, tie="none", source_vocabulary=size)
    assert isinstance(config, seq2seq.Config)
    separate = _of(translator, config)
    counts = draw.count_tokens(separate, [("one two", "two one")])
    figure = draw.draw_embeddings(separate, counts, tmp_path / "embeddings.png")
    assert [axes.get_title() for axes in figure.axes] == ["source", "target"]


def test_learned_alphas_stand_beside_the_distances(translator, tmp_path):
    kind = AttentionKind(name="entmax", layers=(0,))
    learned = _of(
        translator, dataclasses.replace(translator.config, decoder_attention=kind)
    )
    pairs = [("one two three", "three two one")]
    counts = draw.count_tokens(learned, pairs)
    heads = draw.measure_heads(learned, pairs, counts)
    figure = draw.draw_spans(learned, heads, tmp_path / "spans.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes[:3]]
    # Alphas begin halfway between the softmax, 1, and 2.
    assert any("alpha 1.50" in text for text in texts[1])
    assert not any("alpha" in text for text in texts[0] + texts[2])
