"""Runs tests on the device that JAX finds, though they ask for a CPU; fails if they saw another.

python benchmarks/reference_tests.py gpu tests/models/test_vit.py -k forward
"""

import sys

import jax
import pytest


class Seen:
    """Notes where the tests of this process compute."""

    def __init__(self) -> None:
        self.platforms: set[str] = set()

    def pytest_runtest_call(self) -> None:
        self.platforms.add(jax.devices()[0].platform)


def main() -> int | str:
    wanted, *arguments = sys.argv[1:]
    print("tests on", jax.devices())  # from here on JAX keeps them
    seen = Seen()
    # Without the project's options: other processes would do as the tests ask.
    options = ["-o", "addopts=-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    if status := pytest.main([*options, *arguments], plugins=[seen]):
        return int(status)
    if seen.platforms != {wanted}:
        return f"tests were to compute on {wanted}, and did on {seen.platforms or 'nothing'}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
