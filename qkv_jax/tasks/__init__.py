"""Tasks on examples: a reader, a model and, where means do not say it, a scorer make a run."""

from qkv_jax.tasks.config import TaskConfig as TaskConfig
from qkv_jax.tasks.run import TrainedModel as TrainedModel
from qkv_jax.tasks.run import is_task as is_task
from qkv_jax.tasks.run import load_task as load_task
from qkv_jax.tasks.run import make_task as make_task
from qkv_jax.tasks.run import read_task as read_task
