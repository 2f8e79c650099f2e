"""`dino-jax COMMAND`, also `python -m dino_jax COMMAND`: every command of the package."""

import argparse
import functools
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dino_jax.backend import reset_jax_settings, start
from dino_jax.errors import UsageError
from dino_jax.streams import unfailing_output


class Job(NamedTuple):
    """A command, implemented by the function NAME of the module `jobs.NAME`."""

    summary: str
    computes: bool = True  # uses the devices

    def load(self, name: str) -> Callable[..., Any]:
        """The function, wrapped to first set up processes and devices."""
        name = name.replace("-", "_")
        function = getattr(importlib.import_module(f"dino_jax.jobs.{name}"), name)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start(computes=self.computes)
            return function(*args, **kwargs)

        return run


# A job's module is imported only when it runs, so that every command starts fast.
JOBS = {
    "knn": Job("classify images by their nearest neighbours"),
    "linear": Job("train linear classifiers on frozen features"),
    "logistic": Job("logistic regression, also few-shot"),
    "embed": Job("write the features of images to a file"),
    "attention": Job("draw attention maps of pictures"),
    "attention-score": Job("compare attention maps with ground-truth masks"),
    "attention-video": Job("draw attention maps of a video"),
    "pca": Job("draw principal components of patch tokens"),
    "retrieval": Job("landmark retrieval on Revisited Oxford and Paris"),
    "copy-detection": Job("copy detection on Copydays"),
    "video-segmentation": Job("video object segmentation on DAVIS 2017"),
    "pack": Job("pack images into a few large files", computes=False),
    "convert": Job("convert a .pth file of the original DINO to a checkpoint", computes=False),
    "inspect": Job("print what a checkpoint contains", computes=False),
}
TRAIN = "train"  # has its own command line: see `jobs.train`
COMMANDS = {TRAIN: "train a backbone, or resume a run"} | {
    name: job.summary for name, job in JOBS.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Usage and storage errors print one line to stderr and exit with code 2.

    A console that fails ends no command. If the output of a job cannot be written, the job still
    writes its files, and exits with code 1.

    Args:
      arguments: command-line arguments; by default `sys.argv[1:]`.
    """
    with unfailing_output() as (stdout, stderr):
        name = _main(arguments)
        stdout.flush()
        if stdout.failure and name != TRAIN:
            if not isinstance(stdout.failure, BrokenPipeError):  # its reader has seen enough
                stderr.write(f"error: the output cannot be written ({stdout.failure.strerror})\n")
            sys.exit(1)


def _main(arguments: Sequence[str] | None) -> str:
    """Runs a command and returns its name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="dino-jax",
        usage="dino-jax COMMAND [--help] ...",
        description="Trains and evaluates DINO. Commands:",
        epilog="\n".join(f"  {name:19} {summary}" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(2)
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(words[:1]).command
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        _run(name, words[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # not raised by the operating system, so it is a bug
            raise
        way_out = "; run the same command to resume" if name == TRAIN else ""
        print(f"error: {error}{way_out}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # the shell convention for SIGINT
    except RuntimeError as error:
        from dino_jax.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: not enough device memory ({reason}): process fewer or smaller images at a "
            "time (--batch-size, --size), or use a device with more memory",
            file=sys.stderr,
        )
        sys.exit(2)
    return name


def _run(name: str, words: Sequence[str]) -> None:
    if name == TRAIN:
        # Until a run has something to save, Ctrl-C ends it immediately, without a traceback.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless it is ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        from dino_jax.jobs import train

        train.main(words)
        return
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax is verbose
    reset_jax_settings()
    import tyro  # here, because the list of commands does not need it

    tyro.cli(JOBS[name].load(name), prog=f"dino-jax {name}", args=words)
