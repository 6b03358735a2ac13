"""Home Assistant's user-interface text, en-de: the demo's run, with options of its own.

    qkv-jax train experiments/translation/home_assistant.py --data.target fr

Any of the corpus's languages by name. Hardware, time and result: README.md beside this file.
Sizes and rate: small and hot wins where time is short; see README.md.
"""

from qkv_jax.translation import demo

CONFIG = demo.CONFIG
