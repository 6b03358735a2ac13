"""An experiment of the repository with options that make it train in seconds."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MULTI30K = ROOT / "experiments" / "translation" / "multi30k.py"
SMALL = [
    "--data.train",
    "train",
    "--data.valid",
    "valid",
    "--data.test",
    "test",
    "--text.vocabulary",
    "290",
    "--text.batch-tokens",
    "512",
    "--text.buckets",
    "1",
    "--text.max-source",
    "24",
    "--text.max-target",
    "24",
    "--model.d-model",
    "16",
    "--model.d-ff",
    "32",
    "--model.heads",
    "2",
    "--model.encoder-layers",
    "1",
    "--model.decoder-layers",
    "1",
    "--optimizer.warmup-steps",
    "1",
    "--training.steps",
    "2",
    "--training.log-every",
    "1",
    "--validation-sentences",
    "4",
    "--training.metric",
    "bleu",
    "--training.mode",
    "max",
    "--decoding.beams",
    "2",
    "--decoding.max-source",
    "24",
    "--decoding.no-exact",
    "--decoding.max-length",
    "12",
    "--decoding.batch-rows",
    "8",
]
TINY_FILE = """
from pathlib import Path
from qkv_jax.data import ParallelData
from tests.translation import toy
CONFIG = toy.make_config(Path("text"), None, steps=1)
"""


def train(corpus, directory, *more):
    places = ["--data.directory", str(corpus), "--run.directory", str(directory)]
    return ["train", str(MULTI30K), *SMALL, *places, *more]
