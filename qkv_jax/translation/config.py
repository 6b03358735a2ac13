"""The configuration of a translation run, and its form as JSON."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from qkv_jax.compression import GateConfig, Quantisation
from qkv_jax.data import (
    Filters,
    HomeAssistantData,
    HubData,
    MultilingualData,
    ParallelData,
)
from qkv_jax.decoding import LengthPenalty, gnmt, power
from qkv_jax.models import recurrent, seq2seq
from qkv_jax.models.seq2seq_config import RATES
from qkv_jax.training import (
    DistributedConfig,
    FinetuneConfig,
    MeshConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    SparsityConfig,
    Task,
    TrainingConfig,
    apply_precision,
    check_optimizer,
    check_sparsity,
    from_plain,
    to_plain,
)

Data = ParallelData | HomeAssistantData | HubData | MultilingualData
METRICS = {"loss": "min", "nll": "min", "correct": "max", "bleu": "max"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """From text to batches.

    Attributes:
        vocabulary: subwords, shared by both languages.
        tokenizer: SentencePiece's model type.
        sampling: alpha: training pairs are segmented anew in every epoch. Of BPE, the share of
            merges left out (BPE-dropout, 0.1 in its paper); of a unigram model, the power of a
            segmentation's probability (subword regularisation, 0.1 to 0.5), see
            `Tokenizer.sample`. Validation and test text is never sampled. None: it is not.
        sampling_nbest: of a unigram model, how many of the best segmentations are drawn from;
            -1: all.
        filters: which training pairs are left out.
        back_translated: file of further training pairs whose source a model made, as
            `qkv-jax back-translate` writes it: each source gets a tag, so that the model can tell
            (Caswell et al. 2019, arXiv 1906.06442); None: none.
        distilled: file of pairs that take the place of the corpus's training part, as
            `qkv-jax distil` writes it: targets are what a teacher made of the sources; None: none.
        keep_references: distilled pairs stand beside the training part, not in its place. With
            files of several teachers in one, that is data diversification (Nguyen et al. 2020,
            arXiv 1911.01986).
        batch_tokens: target tokens of an update, padding included.
        batch_source_tokens: the same for the source; None: no such limit.
        buckets: static batch shapes, hence compilations of the step.
        packing: training pairs share rows of max_source and max_target tokens, whatever
            `buckets`: one compilation and almost no padding; attention costs more where
            rows are long.
        max_source, max_target: tokens of the longest row, EOS included.
        overlong: whether longer training pairs are dropped or cut; both are counted.
    """

    vocabulary: int = 8000
    tokenizer: Literal["unigram", "bpe"] = "unigram"
    sampling: float | None = None
    sampling_nbest: int = -1
    filters: Filters = field(default_factory=Filters)
    back_translated: Path | None = None
    distilled: Path | None = None
    keep_references: bool = False
    batch_tokens: int = 4096
    batch_source_tokens: int | None = None
    buckets: int = 8
    packing: bool = False
    max_source: int = 128
    max_target: int = 128
    overlong: Literal["drop", "truncate"] = "drop"

    def __post_init__(self):
        for name in (
            "vocabulary",
            "batch_tokens",
            "buckets",
            "max_source",
            "max_target",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.keep_references and self.distilled is None:
            raise ValueError(
                "keep_references needs text.distilled: without it, references are all there is."
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        alpha, nbest, bpe = self.sampling, self.sampling_nbest, self.tokenizer == "bpe"
        if alpha is not None and not 0.0 < alpha < (1.0 if bpe else math.inf):
            allowed = "in (0, 1) for 'bpe'" if bpe else "positive"
            raise ValueError(f"sampling must be {allowed}, or None; got {alpha}.")
        if nbest == -1:
            return
        if alpha is None or bpe:
            raise ValueError(
                "sampling_nbest is of sampling with the tokenizer 'unigram': leave it at -1."
            )
        if not 2 <= nbest <= 512:
            raise ValueError(f"sampling_nbest must be 2 to 512, or -1; got {nbest}.")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How sentences are translated.

    Attributes:
        beams: Z; 1 is greedy search.
        length_penalty: "power" divides by length ** alpha, "gnmt" by ((5 + length) / 6) ** alpha.
        alpha: 0 compares raw log-probabilities.
        exact: whether a search runs until no better hypothesis is possible, or stops once none
            would win by ending at its next token (far fewer steps; may miss a longer one).
        batch_rows: sentences translated at once.
        kv_cache: in what the Transformer remembers keys and values, of the source and of what it
            has said: as it computes ("float"), or in "int8" with a scale for each head of each
            position, in about a quarter of float32's memory.
        max_source: tokens of the longest source, EOS included.
        max_length: tokens of the longest translation, EOS included. A translation has at most
            10 more than twice its source.
        overlong: what becomes of a longer source, which is counted in any case: it is cut
            ("truncate"), translated in parts ("split"), or left empty ("refuse").
        min_length: fewest tokens before EOS.
        no_repeat_ngram: n: no n tokens in a row occur twice; 0: they may.
        repetition_penalty: above 1, what was said becomes less likely; see `Constraints`.
        samples: draw so many translations of a sentence in place of a search; 0: search.
        temperature, top_k, top_p, typical: of the distribution they are drawn from, see
            `decoding.sample`.
        seed: of the samples.
        minimum_risk: whether samples are ordered by their mean chrF against each other, the
            expected utility, which is then their score.
    """

    beams: int = 5
    length_penalty: Literal["power", "gnmt"] = "power"
    alpha: float = 1.0
    exact: bool = False
    batch_rows: int = 64
    kv_cache: Literal["float", "int8"] = "float"
    max_source: int = 256
    max_length: int = 256
    overlong: Literal["truncate", "split", "refuse"] = "truncate"
    min_length: int = 0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    samples: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    typical: float | None = None
    seed: int = 0
    minimum_risk: bool = False

    def __post_init__(self):
        for name in ("beams", "batch_rows", "max_source", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("min_length", "no_repeat_ngram", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must not be negative; got {getattr(self, name)}."
                )
        for name in ("alpha", "temperature", "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}.")
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be positive, or None; got {self.top_k}.")
        for name in ("top_p", "typical"):
            share = getattr(self, name)
            if share is not None and not 0.0 < share <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], or None; got {share}.")
        if self.overlong not in ("truncate", "split", "refuse"):
            raise ValueError(
                f"overlong must be 'truncate', 'split' or 'refuse'; got {self.overlong!r}."
            )
        if self.kv_cache not in ("float", "int8"):
            raise ValueError(
                f"kv_cache must be 'float' or 'int8'; got {self.kv_cache!r}."
            )
        self._check_samples()

    def _check_samples(self) -> None:
        if self.samples:
            return
        if self.minimum_risk:
            raise ValueError("minimum_risk chooses among samples: give samples.")
        for name in ("top_k", "top_p", "typical"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of samples: give samples.")
        if self.temperature != 1.0:
            raise ValueError("temperature is of samples: give samples.")

    @property
    def penalty(self) -> LengthPenalty:
        return (power if self.length_penalty == "power" else gnmt)(self.alpha)

    @property
    def found(self) -> int:
        """The translations of a sentence that are made."""
        return self.samples or self.beams


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """What a published model for several languages, or tasks, has to be told.

    Attributes:
        source, target: the model's codes, such as "eng_Latn"; None: those that its files name.
        prefix: text put before every source, such as "translate English to German: " for T5.
    """

    source: str | None = None
    target: str | None = None
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a model learns from the predictions of another one, the teacher, beside the labels.

    The loss of a token is (1 - weight) times that of its label, plus weight T^2 times the
    divergence of the student's distribution from the teacher's, both softened by T.

    Attributes:
        teacher: directory of a run, or of an imported, published or compressed model, or a hub
            name; None: there is none. Its tokeniser is the run's, so that text.vocabulary and
            text.tokenizer count for nothing, and the model of init_from must have the same.
        weight: of the divergence, in (0, 1].
        temperature: T.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; word-level distillation of Kim and
    Rush 2016, arXiv 1606.07947, section 3.1. Their sequence-level one is `text.distilled`.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.weight <= 1.0:
            raise ValueError(
                f"weight must be in (0, 1]; got {self.weight}: without a teacher, leave it out."
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(
                f"temperature must be positive and finite; got {self.temperature}."
            )
        if self.teacher is None and (self.weight, self.temperature) != (0.5, 1.0):
            raise ValueError(
                "weight and temperature are of a teacher: give distillation.teacher."
            )


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """A translation run.

    Attributes:
        data: where the parallel text comes from.
        init_from: a model whose weights, sizes and tokeniser the run starts from: the directory
            of a run, or of an imported or published model, or a hub name; None: new weights.
        languages: of a published model for several.
        finetune: which of its parameters are trained.
        quantise: what the model learns to be rounded to, see `compression.imitate`: it is trained,
            evaluated and used as `qkv-jax compress` with the same options would have it.
        gates: what attention heads cost, so that those that are not worth it close: fine-tune a
            trained model, then `qkv-jax prune`, by its option `gates`. The latest checkpoint is used.
        sparsity: which weights become 0. The latest checkpoint is used.
        text: tokeniser and batches.
        model: sizes of the Transformer, or of the recurrent model; its vocabulary is the tokeniser's. With init_from, only
            its dropout rates, dtype and context count.
        label_smoothing: share of the target distribution spread over all subwords.
        r_drop: alpha of R-Drop: each training pair goes through the model twice, under two
            dropouts, and is trained on half the sum of both losses and of alpha / 2 times both
            divergences of what they predict (half of Liang et al. 2021, arXiv 2106.14448,
            equation 4: losses stay comparable). An update costs twice as much. 0: none.
        distillation: a teacher whose predictions it learns from too, in training alone.
        optimizer, training, precision, mesh: how it is trained, kept in which dtypes, and on which
            devices.
        validation_sentences: validation pairs translated greedily at each evaluation, for the
            metric "bleu"; 0: none, and the validation loss decides.
        decoding: how the trained model translates.
        run: where the run lies.
        distributed: how its processes find each other.
    """

    data: Data
    init_from: str | None = None
    languages: LanguageConfig = field(default_factory=LanguageConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    quantise: Quantisation = field(default_factory=Quantisation)
    gates: GateConfig = field(default_factory=GateConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    text: TextConfig = field(default_factory=TextConfig)
    # Named apart: tyro would call both of them "config".
    model: (
        Annotated[seq2seq.Config, tyro.conf.subcommand("transformer")]
        | Annotated[recurrent.Config, tyro.conf.subcommand("recurrent")]
    ) = field(default_factory=seq2seq.tiny)
    label_smoothing: float = 0.1
    r_drop: float = 0.0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    validation_sentences: int = 0
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        if self.model.vocabulary:
            raise ValueError(
                "model.vocabulary is the tokeniser's: set text.vocabulary instead; "
                f"got {self.model.vocabulary}."
            )
        if self.init_from is None and self.languages != LanguageConfig():
            raise ValueError("languages are of the model of init_from: give it too.")
        if self.quantise.weights and isinstance(self.model, recurrent.Config):
            raise ValueError(
                "quantise is of the Transformer: the recurrent model multiplies by its weights "
                "itself, not through layers that can be replaced."
            )
        check_kv_cache(self.decoding, self.model)
        self._check_gates()
        check_sparsity(self.sparsity, self.training, self.finetune)
        if self.sparsity.rewind is not None and self.init_from is None:
            raise ValueError(
                "sparsity.rewind goes back within a sparse run: name it by init_from."
            )
        self._check_packing()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing must be in [0, 1); got {self.label_smoothing}."
            )
        if not (math.isfinite(self.r_drop) and self.r_drop >= 0.0):
            raise ValueError(f"r_drop must not be negative; got {self.r_drop}.")
        if self.r_drop and not any(getattr(self.model, name, 0) for name in RATES):
            raise ValueError(
                "r_drop compares two dropouts, and the model has none: give model.dropout."
            )
        if self.training.metric not in METRICS:
            raise ValueError(
                f"metric must be one of {', '.join(METRICS)}; got {self.training.metric!r}."
            )
        if self.training.mode != METRICS[self.training.metric]:
            raise ValueError(
                f"mode must be {METRICS[self.training.metric]!r} for the metric "
                f"{self.training.metric!r}; got {self.training.mode!r}."
            )
        if self.training.metric == "bleu" and self.validation_sentences < 1:
            raise ValueError(
                "metric 'bleu' needs validation_sentences of at least 1; "
                f"got {self.validation_sentences}."
            )
        # A warm-up that does not fit into the steps is an error before anything is written.
        check_optimizer(self.optimizer, self.training, self.precision)
        apply_precision(self.model, self.precision)

    def _check_gates(self) -> None:
        if not self.gates.on:
            return
        headless = isinstance(self.model, recurrent.Config)
        if headless:
            raise ValueError(
                "gates are of attention heads, and the recurrent model has none: leave out "
                "gates.penalty."
            )
        if self.quantise.weights:
            raise ValueError(
                "gates change the scales that quantise rounds with: train with gates, remove heads "
                "by `qkv-jax prune --gates`, and quantise what is left."
            )
        if self.finetune.lora.rank is not None:
            raise ValueError(
                "gates are trained, and lora trains adapters alone: give one of them."
            )
        if self.training.patience is not None:
            raise ValueError(
                "training.patience must be None with gates: the loss on validation text rises as "
                f"they close, and would end the run; got {self.training.patience}."
            )

    def _check_packing(self) -> None:
        model = self.model
        if self.text.packing and isinstance(model, seq2seq.Config) and not model.packs:
            kinds = {model.encoder_attention.name, model.decoder_attention.name}
            raise ValueError(
                "text.packing needs attention that keeps the pairs of a row apart, and that is not "
                f"{' or '.join(sorted(kinds - {'softmax'}))}: set text.packing to False."
            )

    @property
    def computed_model(self) -> seq2seq.Config | recurrent.Config:
        """The model, as it computes by `precision`."""
        return apply_precision(self.model, self.precision)

    def task(self, mesh: Mesh) -> Task:
        """The corpus, the model and its loss on a mesh: see `translation.run.make_task`."""
        from qkv_jax.translation.run import make_task

        return make_task(self, mesh)

    def to_json(self) -> dict[str, Any]:
        """What makes the run what it is: all fields but where it runs, in JSON's types.

        So a run may be resumed on another mesh and with other processes.
        """
        content = to_plain(self)
        del content["run"], content["distributed"], content["mesh"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TranslationConfig":
        """The configuration that `to_json` made the content from.

        Raises:
            ValueError, TypeError, KeyError: it made no such content.
        """
        return from_plain(cls, content)


def check_kv_cache(
    decoding: DecodingConfig, *models: seq2seq.Config | recurrent.Config
) -> None:
    """Raises ValueError where a model cannot remember what the decoding asks for."""
    if decoding.kv_cache == "int8" and any(
        isinstance(model, recurrent.Config) for model in models
    ):
        raise ValueError(
            "kv_cache 'int8' is of the Transformer: a recurrent model remembers one state a layer, "
            "and the source itself, as floats: use 'float'."
        )


def languages_of(data: Data) -> tuple[str | None, str | None]:
    """The source and the target language of a corpus; None: it has several."""
    if not isinstance(data, MultilingualData):
        return data.source, data.target
    sources = {source for source, _ in data.pairs}
    return (
        sources.pop() if len(sources) == 1 else None,
        data.targets[0] if len(data.targets) == 1 else None,
    )
