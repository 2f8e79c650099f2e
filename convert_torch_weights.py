"""Converts a .pth file of the original DINO: python convert_torch_weights.py FILE OUT

Equivalent to `python -m dino_jax convert FILE OUT`; --help lists the options.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python leaves out the script's folder with -P, -I and PYTHONSAFEPATH.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from dino_jax.cli import main

    main(["convert", *sys.argv[1:]])
