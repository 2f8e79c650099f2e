"""Converts a .pth file of the original DINO: python convert_torch_weights.py FILE OUT

Equivalent to `python -m dino_jax convert FILE OUT`; --help lists the options.
"""

import sys

from dino_jax.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
