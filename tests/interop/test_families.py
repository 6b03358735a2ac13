"""The keys of published configurations, at tiny sizes: each is read, or known to change nothing."""

from pathlib import Path

import pytest

from qkv_jax.interop import InteropError
from qkv_jax.interop.pretrained import read_fields

LABELS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
}
SIZES = {
    "d_model": 6,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 7,
    "decoder_ffn_dim": 7,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "num_hidden_layers": 2,
    "max_position_embeddings": 11,
    "dropout": 0.1,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "use_cache": True,
    "transformers_version": "4.4.0.dev0",
}
BART_SIZES = SIZES | {
    "vocab_size": 13,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "num_beams": 4,
    "gradient_checkpointing": False,
}
SUMMARIES = {
    "summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12},
}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 7,
    "d_kv": 3,
    "d_model": 6,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "n_positions": 512,
    "num_heads": 2,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 8,
    "task_specific_params": {"translation_en_to_de": {"prefix": "translate: "}},
    "use_cache": True,
    "vocab_size": 13,
}
GATED = {
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 3,
    "tie_word_embeddings": False,
}

PUBLISHED = {
    "Helsinki-NLP/opus-mt-en-de": SIZES
    | LABELS
    | {
        "model_type": "marian",
        "_name_or_path": "/tmp/Helsinki-NLP/opus-mt-en-de",
        "_num_labels": 3,
        "activation_function": "swish",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "architectures": ["MarianMTModel"],
        "bad_words_ids": [[12]],
        "bos_token_id": 0,
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 12,
        "decoder_vocab_size": 13,
        "eos_token_id": 0,
        "extra_pos_embeddings": 13,
        "forced_eos_token_id": 0,
        "max_length": 512,
        "normalize_before": False,
        "normalize_embedding": False,
        "num_beams": 6,
        "output_past": True,
        "pad_token_id": 12,
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
        "tokenizer_class": "MarianTokenizer",
        "torch_dtype": "float16",
        "vocab_size": 13,
    },
    "facebook/m2m100_418M": BART_SIZES
    | {
        "model_type": "m2m_100",
        "_name_or_path": "hf_models/m2m100_418M",
        "activation_function": "relu",
        "architectures": ["M2M100ForConditionalGeneration"],
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "max_length": 200,
        "scale_embedding": True,
    },
    "facebook/nllb-200-distilled-600M": SIZES
    | {
        "model_type": "m2m_100",
        "activation_function": "relu",
        "architectures": ["M2M100ForConditionalGeneration"],
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
        "max_length": 200,
        "pad_token_id": 1,
        "scale_embedding": True,
        "tokenizer_class": "NllbTokenizer",
        "torch_dtype": "float32",
        "vocab_size": 13,
    },
    "facebook/bart-large": BART_SIZES
    | LABELS
    | {
        "model_type": "bart",
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "architectures": ["BartModel"],
        "classif_dropout": 0.1,
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "scale_embedding": False,
        "task_specific_params": SUMMARIES,
        "torch_dtype": "float32",
    },
    "facebook/bart-large-cnn": BART_SIZES
    | LABELS
    | {
        "model_type": "bart",
        "_num_labels": 3,
        "activation_function": "gelu",
        "add_final_layer_norm": False,
        "architectures": ["BartForConditionalGeneration"],
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 2,
        "do_blenderbot_90_layernorm": False,
        "early_stopping": True,
        "extra_pos_embeddings": 2,
        "force_bos_token_to_be_generated": True,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "length_penalty": 2.0,
        "max_length": 142,
        "min_length": 56,
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "normalize_embedding": True,
        "output_past": True,
        "prefix": " ",
        "save_step": 58,
        "scale_embedding": False,
        "static_position_embeddings": False,
        "task_specific_params": SUMMARIES,
    },
    "facebook/mbart-large-cc25": BART_SIZES
    | LABELS
    | {
        "model_type": "mbart",
        "_num_labels": 3,
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "architectures": ["MBartForConditionalGeneration"],
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "extra_pos_embeddings": 2,
        "forced_eos_token_id": 2,
        "max_length": 1024,
        "normalize_before": True,
        "normalize_embedding": True,
        "output_past": True,
        "scale_embedding": True,
        "static_position_embeddings": False,
        "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 9}},
    },
    "facebook/mbart-large-50-many-to-many-mmt": BART_SIZES
    | LABELS
    | {
        "model_type": "mbart",
        "activation_function": "relu",
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "architectures": ["MBartForConditionalGeneration"],
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "forced_eos_token_id": 2,
        "max_length": 200,
        "normalize_before": True,
        "normalize_embedding": True,
        "output_past": True,
        "scale_embedding": True,
        "static_position_embeddings": False,
        "tokenizer_class": "MBart50Tokenizer",
    },
    "t5-small": T5,
    "google/t5-v1_1-small": T5 | GATED,
    "google/mt5-small": T5
    | GATED
    | {"model_type": "mt5", "tokenizer_class": "T5Tokenizer"},
    "google/flan-t5-small": T5
    | GATED
    | {
        "classifier_dropout": 0.0,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "relative_attention_max_distance": 128,
    },
}


def read(settings, **options):
    return read_fields(settings, {}, Path("published"), **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_configuration_is_known(name):
    fields, special = read(PUBLISHED[name])
    assert fields["d_model"] == 6 and fields["decoder_layers"] == (
        2 if name == "t5-small" else 3
    )
    assert special["start"] == PUBLISHED[name].get("decoder_start_token_id")
    assert special["eos"] == PUBLISHED[name]["eos_token_id"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_unknown_key_is_an_error_until_it_is_ignored(name):
    settings = PUBLISHED[name] | {"novel": 3, "newer": None}
    with pytest.raises(InteropError, match="'newer' is unknown.*'novel' is unknown"):
        read(settings)
    read(settings, ignore=["novel", "newer"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_that_make_another_model_are_errors(name):
    for key in ("d_model", "vocab_size", "eos_token_id", "pad_token_id"):
        with pytest.raises(InteropError, match=key):
            read({x: y for x, y in PUBLISHED[name].items() if x != key})
    with pytest.raises(InteropError, match="is_encoder_decoder' must be True"):
        read(PUBLISHED[name] | {"is_encoder_decoder": False})


def test_what_differs_between_published_models_is_read():
    fields = {name: read(settings)[0] for name, settings in PUBLISHED.items()}
    marian, bart = fields["Helsinki-NLP/opus-mt-en-de"], fields["facebook/bart-large"]
    assert (marian["activation"], marian["norm"], marian["zero_pad"]) == (
        "silu",
        "post",
        True,
    )
    assert (bart["activation"], bart["norm"], bart["positions"]) == (
        "gelu",
        "post",
        "learned",
    )
    assert fields["facebook/mbart-large-cc25"]["norm"] == "pre"
    assert fields["t5-small"]["output_scale"] == 6**-0.5
    flan = fields["google/flan-t5-small"]
    assert (flan["gated"], flan["activation"], flan["output_scale"]) == (
        True,
        "gelu_tanh",
        1.0,
    )


def test_only_mbart_may_name_no_start():
    bart = PUBLISHED["facebook/bart-large"]
    with pytest.raises(InteropError, match="decoder_start_token_id"):
        read({x: y for x, y in bart.items() if x != "decoder_start_token_id"})
    mbart = PUBLISHED["facebook/mbart-large-cc25"]
    with pytest.raises(InteropError, match="'eos_token_id' must be an id"):
        read({x: y for x, y in mbart.items() if x != "eos_token_id"})
