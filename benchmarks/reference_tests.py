"""Does the package compute the reference's numbers on this device? Prints one JSON line.

python benchmarks/reference_tests.py tests/models/test_vit.py -k forward

Runs tests on the device that JAX finds, although the test suite asks for a CPU, with matrix
products in full precision. The arguments are pytest's, and its output goes to stderr. The exit code
is 1 if a test fails, if no test runs, or if a test computes on another device.
"""

import contextlib
import sys
from collections import Counter

import jax
import pytest
from machine import report


class Outcomes:
    """Counts the outcomes of tests and notes where they compute."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.platforms: set[str] = set()

    def pytest_runtest_call(self) -> None:
        self.platforms.add(jax.devices()[0].platform)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.count[report.outcome] += 1


def main() -> int:
    platform = jax.devices()[0].platform  # initialises JAX: later settings do not change the device
    jax.config.update("jax_default_matmul_precision", "highest")
    outcomes = Outcomes()
    # Without the project's options, which would start worker processes on the CPU.
    options = ["-o", "addopts=-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([*options, *sys.argv[1:]], plugins=[outcomes])
    passed = status == 0 and outcomes.platforms == {platform}
    result = {"passed": passed, "tests": outcomes.count, "platforms": sorted(outcomes.platforms)}
    report("reference_tests", result | {"arguments": sys.argv[1:]})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
