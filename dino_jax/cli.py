"""python -m dino_jax JOB: every job but training. Each is a typed function, run by its name."""

import logging
import sys
from collections.abc import Sequence

import tyro

from dino_jax.data.pack import pack
from dino_jax.distributed import initialize_if_launched
from dino_jax.errors import UsageError
from dino_jax.evaluate.copy_detection_job import copy_detection
from dino_jax.evaluate.embed_job import embed
from dino_jax.evaluate.knn_job import knn
from dino_jax.evaluate.linear_job import linear
from dino_jax.evaluate.logistic_job import logistic
from dino_jax.evaluate.retrieval_job import retrieval
from dino_jax.evaluate.video_segmentation_job import video_segmentation
from dino_jax.inspection import inspect
from dino_jax.visualize.attention_job import attention
from dino_jax.visualize.pca_job import pca
from dino_jax.visualize.score_job import attention_score
from dino_jax.visualize.video_job import attention_video
from dino_jax.weights.convert import convert

JOBS = {
    "knn": knn,
    "linear": linear,
    "logistic": logistic,
    "embed": embed,
    "attention": attention,
    "attention-score": attention_score,
    "attention-video": attention_video,
    "pca": pca,
    "retrieval": retrieval,
    "copy-detection": copy_detection,
    "video-segmentation": video_segmentation,
    "pack": pack,
    "convert": convert,
    "inspect": inspect,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a job; wrong usage is one line on stderr and exit code 2.

    Args:
      arguments: of the command line; unset, those of this process.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own affairs
    try:
        initialize_if_launched()
        tyro.extras.subcommand_cli_from_dict(
            JOBS, prog="dino-jax", description="Jobs on trained DINO models.", args=arguments
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells say it
