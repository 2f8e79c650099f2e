"""python -m dino_jax JOB: every job but training. Each is a typed function, run by its name."""

import argparse
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dino_jax.cache import keep_compiled_programs
from dino_jax.errors import UsageError


class Job(NamedTuple):
    """A function that has the job's name, and what it does in a few words."""

    module: str
    summary: str
    computes: bool = True  # on the devices, which the others leave alone

    def load(self, name: str) -> Callable[..., Any]:
        """The function; called, it first sees to processes and programs."""
        module = importlib.import_module(f"dino_jax.{self.module}")
        function = getattr(module, name.replace("-", "_"))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            from dino_jax.distributed import initialize_if_launched

            initialize_if_launched()
            if self.computes:
                keep_compiled_programs()
            return function(*args, **kwargs)

        return run


# By module, so that a command imports what it runs and no more.
JOBS = {
    "knn": Job("jobs.knn", "classify images by their nearest neighbours"),
    "linear": Job("jobs.linear", "train linear classifiers on frozen features"),
    "logistic": Job("jobs.logistic", "logistic regression, also few-shot"),
    "embed": Job("jobs.embed", "write the features of images to a file"),
    "attention": Job("jobs.attention", "draw where a network looks in pictures"),
    "attention-score": Job("jobs.attention_score", "compare attention with true masks"),
    "attention-video": Job("jobs.attention_video", "draw where a network looks in a video"),
    "pca": Job("jobs.pca", "draw principal components of patch tokens"),
    "retrieval": Job("jobs.retrieval", "landmarks of Revisited Oxford and Paris"),
    "copy-detection": Job("jobs.copy_detection", "attacked copies of Copydays"),
    "video-segmentation": Job("jobs.video_segmentation", "objects of DAVIS 2017"),
    "pack": Job("jobs.pack", "write images to a few large files", False),
    "convert": Job("jobs.convert", "turn a .pth file of the reference into a checkpoint", False),
    "inspect": Job("jobs.inspect", "say what a checkpoint holds", False),
}


def exit_code(error: OSError, way_out: str = "") -> int:
    """Says an error of the system in a line on stderr: no traceback would explain a full disk.

    Args:
      error: that is being handled.
      way_out: the end of the line.
    Returns: the exit code.
    Raises:
      OSError: the error itself, where it is not the system's own.
    """
    if error.errno is None:
        raise error
    print(f"error: {error}{way_out}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a job; wrong usage, or storage that fails, is one line on stderr and exit code 2.

    Args:
      arguments: of the command line; unset, those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="dino-jax",
        usage="dino-jax JOB [--help] ...",
        description="Jobs on trained DINO models:",
        epilog="\n".join(f"  {name:19} {job.summary}" for name, job in JOBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=JOBS, help=argparse.SUPPRESS)
    name = parser.parse_args(words[:1]).job

    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own affairs
    import tyro  # the list of jobs does not need it

    try:
        tyro.cli(JOBS[name].load(name), prog=f"dino-jax {name}", args=words[1:])
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # nobody reads the output any more
        # As Python ends it writes what is left, and would say that this fails once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells say it
    except RuntimeError as error:
        from dino_jax.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0]
        print(
            f"error: the memory of a device does not do ({said}): give less at a time, with a "
            "smaller --size or --batch-size, or take a larger device",
            file=sys.stderr,
        )
        sys.exit(2)
