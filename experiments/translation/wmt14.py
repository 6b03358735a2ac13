"""WMT14, English to German, from the hub: the base and the big Transformer of Vaswani et al. 2017.

    qkv-jax train experiments/translation/wmt14.py

Needs the extra `hub`, and 8 accelerators or patience. Published, tokenised BLEU: 27.3 (base) and 28.4
(big); big: --model.d-model 1024 --model.d-ff 4096 --model.heads 16 --model.dropout 0.3
--training.steps 300000. What a mesh needs: `qkv-jax plan` with the same arguments and --devices.
Sizes and rates are the paper's (arXiv 1706.03762): 25,000 source and target tokens an update,
4,000 updates of warm-up, 37,000 subwords, smoothing 0.1, 5 averaged checkpoints, beam 4, GNMT
penalty 0.6. Difference: the text is as the hub has it, not Moses-tokenised. Not run to its end:
tests shape it, and train it shrunk.
"""

from qkv_jax.data import Filters, HubData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=HubData(name="wmt/wmt14", config="de-en", source="en", target="de"),
    text=TextConfig(
        vocabulary=37000,
        tokenizer="bpe",
        filters=Filters(max_words=250, max_ratio=2.0),
        batch_tokens=25000,
        packing=True,
        max_source=256,
        max_target=256,
    ),
    model=seq2seq.base(),
    optimizer=OptimizerConfig(peak_lr=7e-4, warmup_steps=4000),
    training=TrainingConfig(
        steps=100000, evaluate_every=2000, checkpoint_every=1000, average=5, keep=5
    ),
    decoding=DecodingConfig(beams=4, length_penalty="gnmt", alpha=0.6, max_length=256),
)
