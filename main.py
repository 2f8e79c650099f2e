"""Trains DINO: python main.py --config=configs/vit_small.py --workdir=runs/s16

The same as `dino-jax train`; --help lists the options.
"""

import sys

from dino_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
