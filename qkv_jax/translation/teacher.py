"""A trained model whose predictions another one learns from, word by word."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import data, training
from qkv_jax.data import SentenceTokenizer
from qkv_jax.interop import InteropError
from qkv_jax.models import seq2seq
from qkv_jax.training.losses import Taught
from qkv_jax.translation.config import TranslationConfig
from qkv_jax.translation.models import ModelConfig, check_mesh, model_graph
from qkv_jax.translation.search import shift
from qkv_jax.translation.start import NO_LANGUAGES, Start, is_run, load_start

OTHERWISE = "or train on its translations instead, which `qkv-jax distil` writes"


class Teacher(NamedTuple):
    """What a loss needs of a teacher.

    Attributes:
        model: its configuration.
        params: its weights, which nothing changes.
        weight, temperature: how much it counts, see `DistillationConfig`.
    """

    model: ModelConfig
    params: Any
    weight: float
    temperature: float

    def taught(
        self, params: Any, batch: dict[str, jax.Array], *, start: int, eos: int
    ) -> Taught:
        """What it predicts of a batch's targets, without dropout.

        Args:
            params: its own, as an argument of the program that this is part of.
            batch: see `qkv_jax.translation.loss.make_loss`.
            start, eos: ids that targets start from and end with.
        """
        model = nnx.merge(model_graph(self.model), params)
        shifted, segments = decoder_inputs(batch, start=start, eos=eos)
        states = model.states(batch["source"], shifted, segments=segments)
        states, table = model.projection(states)
        return Taught(
            states=states,
            table=table,
            weight=self.weight,
            temperature=self.temperature,
        )


def decoder_inputs(
    batch: dict[str, jax.Array], *, start: int, eos: int
) -> tuple[jax.Array, seq2seq.Segments | None]:
    """What the decoder is given for a batch's targets, (B, T), and the pairs of packed rows."""
    shifted = shift(batch["target"], start)
    if "target_segments" not in batch:
        return shifted, None
    segments = seq2seq.Segments(batch["source_segments"], batch["target_segments"])
    return jnp.where(shifted == eos, start, shifted), segments


def load_teacher(config: TranslationConfig) -> Start | None:
    """The teacher of a run, in float; None: it has none.

    Raises:
        RunError: there is no such model; or it has a published tokeniser, which a run with new
            weights cannot take over.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    languages = NO_LANGUAGES if is_run(name) else config.languages
    try:
        start = load_start(name, languages=languages).in_float()
    except (training.RunError, InteropError) as error:
        raise training.RunError(
            f"distillation.teacher, which the run needs to begin and to go on: {error}"
        ) from error
    if config.init_from is None and not isinstance(start.tokenizer, data.Tokenizer):
        raise training.RunError(
            f"distillation.teacher {name} has a published tokeniser, which new weights cannot take "
            f"over: give an init_from that has it, {OTHERWISE}."
        )
    return start


def make_teacher(
    config: TranslationConfig,
    start: Start | None,
    *,
    model: ModelConfig,
    tokenizer: SentenceTokenizer,
    mesh: jax.sharding.Mesh,
) -> Teacher | None:
    """The teacher, on the mesh.

    Args:
        config: of the run.
        start: the teacher as loaded; None: there is none.
        model: the student.
        tokenizer: of the student.
        mesh: of the run; the teacher's weights are shared out by the rules of the student's.

    Raises:
        RunError: it does not predict what the student does, or the mesh does not fit it.
    """
    if start is None:
        return None
    _check_fits(config, start, model, tokenizer)
    try:
        check_mesh(start.model, mesh.shape)
        params = training.place_state(start.params, mesh)
    except ValueError as error:
        raise training.RunError(f"mesh: distillation.teacher: {error}") from error
    how = config.distillation
    return Teacher(start.model, params, how.weight, how.temperature)


def _check_fits(
    config: TranslationConfig,
    start: Start,
    model: ModelConfig,
    tokenizer: SentenceTokenizer,
) -> None:
    name = config.distillation.teacher
    if start.tokenizer.digest != tokenizer.digest:
        raise training.RunError(
            f"distillation.teacher {name} has another tokeniser than {config.init_from}: words are "
            f"compared one by one. Choose a teacher of the same, {OTHERWISE}."
        )
    theirs, ours = start.model.vocabulary, model.vocabulary
    if theirs != ours:
        raise training.RunError(
            f"distillation.teacher {name} scores {theirs:,} tokens, and the student {ours:,}: "
            f"choose a teacher of the same vocabulary, {OTHERWISE}."
        )
    longest = max(config.text.max_source, config.text.max_target)
    known = getattr(start.model, "max_positions", longest)
    if getattr(start.model, "positions", "") == "learned" and known < longest:
        raise training.RunError(
            f"distillation.teacher {name} knows {known} positions: text.max_source and "
            f"text.max_target must not exceed them; got {longest}."
        )
