"""The command line: `qkv-jax COMMAND`, one module for each kind of command."""

from qkv_jax.cli.entry import main as main
