"""The package's configs, importable by name: `from dino_jax.configs import vit_small`.

A wheel contains them here. In a checkout they are the files of the repository's `configs/`.
"""

from pathlib import Path

if not (Path(__file__).parent / "default.py").is_file():
    __path__ = [str(Path(__file__).parents[2] / "configs")]
