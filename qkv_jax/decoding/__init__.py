"""Search over `step(tokens, cache) -> (logits, cache)`: greedy, beam and sampling, under rules.

Also: ensembles as one step, CTC alone or joined with a decoder as one, scores of known targets, and minimum-Bayes-risk choice by chrF.
"""

from qkv_jax.decoding.beam import beam_search as beam_search
from qkv_jax.decoding.character_ngrams import chrf as chrf
from qkv_jax.decoding.constraints import Constraints as Constraints
from qkv_jax.decoding.ctc import JointCache as JointCache
from qkv_jax.decoding.ctc import PrefixCache as PrefixCache
from qkv_jax.decoding.ctc import ctc_greedy as ctc_greedy
from qkv_jax.decoding.ctc import joint_step as joint_step
from qkv_jax.decoding.ctc import prefix_step as prefix_step
from qkv_jax.decoding.ensembles import EnsembleCache as EnsembleCache
from qkv_jax.decoding.ensembles import average_log_probs as average_log_probs
from qkv_jax.decoding.ensembles import ensemble as ensemble
from qkv_jax.decoding.greedy import greedy_search as greedy_search
from qkv_jax.decoding.hypotheses import Hypotheses as Hypotheses
from qkv_jax.decoding.length_penalty import LengthPenalty as LengthPenalty
from qkv_jax.decoding.length_penalty import gnmt as gnmt
from qkv_jax.decoding.length_penalty import power as power
from qkv_jax.decoding.mbr import Risks as Risks
from qkv_jax.decoding.mbr import minimum_bayes_risk as minimum_bayes_risk
from qkv_jax.decoding.sampling import sample as sample
from qkv_jax.decoding.scoring import TargetScores as TargetScores
from qkv_jax.decoding.scoring import score_targets as score_targets
from qkv_jax.decoding.steps import LogProbs as LogProbs
