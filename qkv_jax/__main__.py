"""`python -m qkv_jax`: the same command line as `qkv-jax`."""

import sys

from qkv_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
