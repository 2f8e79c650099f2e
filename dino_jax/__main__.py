"""`python -m dino_jax JOB`; see `dino_jax.cli`."""

from dino_jax.cli import main

main()
