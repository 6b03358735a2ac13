"""The configurations of published model families, read into ours key by key.

No key that changes what is computed has a default here, except where a key did not exist when
checkpoints of a family were first published, and its absence means what it meant then. A key
that is not known is an error: it could change the model.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

# What does not change what a model computes: training, labels, book-keeping, search.
NEUTRAL = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "id2label",
    "label2id",
    "init_std",
    "initializer_factor",
    "classif_dropout",
    "classifier_dropout",
    "gradient_checkpointing",
    "save_step",
    "output_past",
    "task_specific_params",
    "prefix",
    "num_hidden_layers",
    "n_positions",
    "tokenizer_class",
    "model_type",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "max_length",
    "min_length",
    "num_beams",
    "no_repeat_ngram_size",
    "early_stopping",
    "length_penalty",
    "bad_words_ids",
    "forced_eos_token_id",
    "bos_token_id",
    "force_bos_token_to_be_generated",
    "classifier_activation",
    "problem_type",
    "_num_labels",
    "num_labels",
    "pruned_heads",
    "torchscript",
    "language",
    "use_bfloat16",
    "repetition_penalty",
    "top_k",
    "top_p",
    "temperature",
    "do_sample",
    "add_cross_attention",
    "tie_encoder_decoder",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "is_composition",
    "num_beam_groups",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "tf_legacy_loss",
    "typical_p",
    # Of the first releases; since 2020 the tensors alone decide what these said.
    "add_bias_logits",
    "extra_pos_embeddings",
}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


class Keys:
    """A configuration whose keys are ticked off as they are read, and what is wrong with it."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.read: set[str] = set()
        self.problems: list[str] = []

    def __call__(self, name: str) -> Any:
        """The key's value; a problem, and 1 in its place, where it is absent."""
        self.read.add(name)
        if self.content.get(name) is None:
            self.problems.append(f"config key {name!r} is missing")
            return 1
        return self.content[name]

    def since(self, name: str, before: Any) -> Any:
        """The value of a key that came to a family later; `before` is what its absence means."""
        self.read.add(name)
        value = self.content.get(name)
        return before if value is None else value

    def fixed(self, **wanted: Any) -> None:
        """Keys that, where they are present, can only have one value."""
        for name, value in wanted.items():
            self.read.add(name)
            found = self.content.get(name, value)
            if found != value:
                self.problems.append(
                    f"config key {name!r} must be {value!r}; it is {found!r}"
                )

    def activation(self, name: str) -> Any:
        value = self(name)
        if value not in ACTIVATIONS:
            self.problems.append(
                f"config key {name!r} must be one of {sorted(ACTIVATIONS)}; it is {value!r}"
            )
        return ACTIVATIONS.get(value, "relu")

    def finish(self, ignore: Collection[str]) -> list[str]:
        """All that is wrong, unknown keys included."""
        known = self.read | NEUTRAL | set(ignore)
        unknown = [name for name in sorted(self.content) if name not in known]
        return self.problems + [
            f"config key {name!r} is unknown: if it does not change what is computed, ignore it"
            for name in unknown
        ]


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints are read.

    Attributes:
        fields: keys -> fields of our Config; the vocabulary and tie are read from the tensors.
        prefix: of the names of its tensors, before "encoder" and "decoder".
        t5: whether blocks are named as T5's are, or as BART's.
        sinusoids: whether a checkpoint may hold its sinusoids, which are computed anew.
        starts_from_language: whether targets start from their language where a checkpoint
            names no start, as mBART's do.
    """

    fields: Callable[[Keys], dict[str, Any]]
    prefix: str = "model."
    t5: bool = False
    sinusoids: bool = False
    starts_from_language: bool = False


def _bart_like(keys: Keys) -> dict[str, Any]:
    heads, decoder_heads = (
        keys("encoder_attention_heads"),
        keys("decoder_attention_heads"),
    )
    width, decoder_width = keys("encoder_ffn_dim"), keys("decoder_ffn_dim")
    keys.fixed(
        is_encoder_decoder=True, is_decoder=False, do_blenderbot_90_layernorm=False
    )
    keys.since("tie_word_embeddings", True)
    return {
        "d_model": keys("d_model"),
        "d_ff": width,
        "decoder_d_ff": None if decoder_width == width else decoder_width,
        "heads": heads,
        "decoder_heads": None if decoder_heads == heads else decoder_heads,
        "encoder_layers": keys("encoder_layers"),
        "decoder_layers": keys("decoder_layers"),
        "activation": keys.activation("activation_function"),
        "dropout": keys("dropout"),
        "attention_dropout": keys("attention_dropout"),
        "activation_dropout": keys("activation_dropout"),
        "embedding_scale": keys("scale_embedding"),
        "max_positions": keys("max_position_embeddings"),
        "pad": keys("pad_token_id"),
    }


def _marian(keys: Keys) -> dict[str, Any]:
    fields = _bart_like(keys)
    keys.fixed(
        normalize_before=False,
        normalize_embedding=False,
        add_final_layer_norm=False,
        static_position_embeddings=True,
    )
    keys.since("share_encoder_decoder_embeddings", True)
    keys.since("decoder_vocab_size", keys("vocab_size"))
    # What starts from padding starts from zeros, as in Marian itself.
    zero = keys.since("decoder_start_token_id", fields["pad"]) == fields["pad"]
    return fields | {"norm": "post", "output_bias": True, "zero_pad": zero}


def _pre_norm(keys: Keys) -> dict[str, Any]:
    fields = _bart_like(keys)
    keys("vocab_size")
    keys.fixed(
        normalize_before=True,
        normalize_embedding=False,
        add_final_layer_norm=True,
        static_position_embeddings=True,
    )
    return fields | {"norm": "pre"}


def _pegasus(keys: Keys) -> dict[str, Any]:
    return _pre_norm(keys) | {"output_bias": True}


def _m2m(keys: Keys) -> dict[str, Any]:
    fields = _pre_norm(keys)
    return fields | {
        "positions": "sinusoid_inclusive",
        "position_offset": fields["pad"] + 1,
    }


def _bart(keys: Keys) -> dict[str, Any]:
    keys.fixed(normalize_before=False, add_final_layer_norm=False)
    return _learned(keys) | {"norm": "post"}


def _mbart(keys: Keys) -> dict[str, Any]:
    keys.fixed(normalize_before=True, add_final_layer_norm=True)
    return _learned(keys) | {"norm": "pre"}


def _learned(keys: Keys) -> dict[str, Any]:
    fields = _bart_like(keys)
    keys("vocab_size")
    keys.fixed(normalize_embedding=True, static_position_embeddings=False)
    return fields | {
        "positions": "learned",
        "position_offset": 2,
        "embedding_norm": True,
        "output_bias": True,
    }


def _t5(keys: Keys) -> dict[str, Any]:
    # Before the key, outputs were scaled where they were tied to the embeddings.
    return _t5_like(keys, scaled=keys.since("tie_word_embeddings", True))


def _mt5(keys: Keys) -> dict[str, Any]:
    keys.since("tie_word_embeddings", False)
    return _t5_like(keys, scaled=False)


def _t5_like(keys: Keys, *, scaled: bool) -> dict[str, Any]:
    keys.fixed(is_encoder_decoder=True, is_decoder=False)
    kind = keys.since("feed_forward_proj", "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    activation = "gelu_new" if kind == "gated-gelu" else name
    if activation not in ACTIVATIONS:
        keys.problems.append(f"config key 'feed_forward_proj' is {kind!r}: unknown")
    keys.fixed(is_gated_act=gated, dense_act_fn=activation)
    scaled = keys.since("scale_decoder_outputs", scaled)
    layers, width = keys("num_layers"), keys("d_model")
    keys("vocab_size")
    rate = keys("dropout_rate")
    return {
        "d_model": width,
        "d_ff": keys("d_ff"),
        "heads": keys("num_heads"),
        "head_size": keys("d_kv"),
        "encoder_layers": layers,
        "decoder_layers": keys.since("num_decoder_layers", layers),
        "activation": ACTIVATIONS.get(activation, "relu"),
        "gated": gated,
        "norm": "pre",
        "normalisation": "rms",
        "epsilon": keys("layer_norm_epsilon"),
        "bias": False,
        "attention_scale": 1.0,
        "positions": "relative",
        "relative_buckets": keys("relative_attention_num_buckets"),
        "relative_distance": keys.since("relative_attention_max_distance", 128),
        "embedding_scale": False,
        "output_scale": width**-0.5 if scaled else 1.0,
        "dropout": rate,
        "attention_dropout": rate,
        "activation_dropout": rate,
        "pad": keys("pad_token_id"),
    }


FAMILIES = {
    "marian": Family(_marian, sinusoids=True),
    "pegasus": Family(_pegasus, sinusoids=True),
    "m2m_100": Family(_m2m, sinusoids=True),
    "bart": Family(_bart),
    "mbart": Family(_mbart, starts_from_language=True),
    "t5": Family(_t5, prefix="", t5=True),
    "mt5": Family(_mt5, prefix="", t5=True),
}
