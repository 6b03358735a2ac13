"""Search over `step(tokens, cache) -> (logits, cache)`: greedy and beam, n-best with scores."""

from qkv_jax.decoding.beam import beam_search as beam_search
from qkv_jax.decoding.constraints import Constraints as Constraints
from qkv_jax.decoding.greedy import greedy_search as greedy_search
from qkv_jax.decoding.hypotheses import Hypotheses as Hypotheses
from qkv_jax.decoding.length_penalty import LengthPenalty as LengthPenalty
from qkv_jax.decoding.length_penalty import gnmt as gnmt
from qkv_jax.decoding.length_penalty import power as power
