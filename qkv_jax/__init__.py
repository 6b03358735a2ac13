"""Attention as composable pure functions, and a JAX trainer for sequence-to-sequence models.

Nothing is imported here before it is used: take what you need from `qkv_jax.ops`,
`qkv_jax.models`, `qkv_jax.training` and their neighbours. `translate` is the short way to a
translation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkv_jax.translation import Translation

__version__ = "0.1.0.dev0"


def translate(
    model: Any,
    sentences: Sequence[str],
    *,
    n_best: int = 1,
    align: bool = False,
    source_language: str | None = None,
    target_language: str | None = None,
    source_prefix: str = "",
    prefixes: Sequence[str] | None = None,
    phrases: Sequence[Sequence[str]] | None = None,
    banned: Sequence[str] = (),
    **decoding: Any,
) -> "list[list[Translation]]":
    """The n best translations of each sentence, best first, each with text and score.

    Args:
        model: directory of a run, or of an imported or published model; a name on the hub, such
            as "Helsinki-NLP/opus-mt-en-de"; a list of these, which decide together; or a
            `translation.Translator`, which is not loaded again.
        sentences: any number of any length; a blank one stays blank.
        n_best: translations of each; at least so many beams are kept.
        align: whether to say which words look at which: `Translation.alignment`, with its
            `weights`, `pairs` and `pharaoh`.
        source_language, target_language: of a published model for several, such as "eng_Latn".
        source_prefix: text before every source, such as "translate English to German: ".
        prefixes: of each sentence, what its translation begins with.
        phrases: of each sentence, what its translation has to hold.
        banned: what no translation may hold.
        **decoding: fields of `translation.DecodingConfig`, such as beams=4, samples=16.

    Raises:
        RunError, InteropError: there is no such model, or it is damaged.
        ValueError: an option is wrong.
    """
    from qkv_jax.translation import (
        LanguageConfig,
        Translator,
        Wishes,
        load_translator,
    )

    languages = LanguageConfig(
        source=source_language, target=target_language, prefix=source_prefix
    )
    if isinstance(model, Translator):
        if decoding or languages != LanguageConfig():
            raise ValueError(
                "a Translator keeps its decoding and languages: give them to load_translator."
            )
    else:
        names = model if isinstance(model, list) else [model]
        model = load_translator(*names, languages=languages, n_best=n_best, **decoding)
    wishes = Wishes(prefixes=prefixes, phrases=phrases, banned=banned)
    return model(list(sentences), n_best=n_best, align=align, wishes=wishes)
