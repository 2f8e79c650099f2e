"""What a run prints while it trains: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dino_jax.streams import UnfailingStream

PLAIN_LINE_SECONDS = 10.0  # minimum time between progress lines without a terminal


class Console:
    """The console of a run, as a context manager.

    Args:
      start: optimizer steps already taken.
      steps_per_epoch: optimizer steps in an epoch.
      total_steps: optimizer steps of the whole run.
    """

    def __init__(self, *, start: int, steps_per_epoch: int, total_steps: int) -> None:
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._start = start
        self._stream = UnfailingStream(sys.stderr)
        self._bar: tqdm | None = None
        self._next_plain_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = tqdm(
                file=self._stream,
                total=self._total_steps,
                initial=self._start,
                dynamic_ncols=True,
                bar_format="|{bar}| {desc}",
            )
            self._redirect = logging_redirect_tqdm()  # prints warnings above the bar
            self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._redirect.__exit__(None, None, None)
            self._bar.close()

    def message(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        tqdm.write(text, file=self._stream)

    def progress(
        self, step: int, values: Mapping[str, float], speed: Mapping[str, float], eta: float
    ) -> None:
        """Shows how far the run is.

        Args:
          step: optimizer steps taken.
          values: contains `loss` and `lr`.
          speed: contains `images_per_second` and `data_wait`, and `device_memory_gib` if known.
          eta: seconds until the run ends.
        """
        epochs = self._total_steps / self._steps_per_epoch
        memory = speed.get("device_memory_gib")
        parts = [  # short enough to fit beside a bar in 80 columns
            f"epoch {step / self._steps_per_epoch:.2f}/{epochs:.4g}",
            f"loss {values['loss']:.3f}",
            f"lr {values['lr']:.1e}",
            f"{speed['images_per_second']:.0f} images/s",
            f"wait {speed['data_wait']:.0%}",
            *([] if memory is None else [f"{memory:.1f} GiB"]),
            f"ETA {tqdm.format_interval(eta)}",
        ]
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_description_str(" ".join(parts))
        elif time.monotonic() >= self._next_plain_line or step == self._total_steps:
            self._next_plain_line = time.monotonic() + PLAIN_LINE_SECONDS
            self.message("  ".join(parts))
