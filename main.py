"""Trains DINO: python main.py --config=configs/vit_small.py --workdir=runs/s16

The same as `dino-jax train`; --help lists the options.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python leaves out the script's folder with -P, -I and PYTHONSAFEPATH.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from dino_jax.cli import main

    main(["train", *sys.argv[1:]])
