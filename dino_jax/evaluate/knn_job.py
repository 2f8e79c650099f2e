"""The k-NN job: from weights and two sources to a table."""

from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from dino_jax import sharding
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import EvalTransform, Features, extract, feature_function
from dino_jax.evaluate.knn import KS, check_votes
from dino_jax.evaluate.labelled import knn_of_sources, open_labelled
from dino_jax.evaluate.results import check_writable, table, write_results
from dino_jax.models.network import split
from dino_jax.weights.load import load


def knn(
    weights: str,
    train: str,
    test: str,
    which: Literal["teacher", "student"] = "teacher",
    ks: tuple[int, ...] = KS,
    temperature: float = 0.07,
    resize: int | None = None,
    crop: int | None = None,
    canvas_size: int = 512,
    batch_size: int = 256,
    num_threads: int = 8,
    max_unreadable: float = 0.05,
    output: Path = Path("results.json"),
) -> dict[int, dict[str, float]]:
    """Classifies test images by their nearest training images in feature space.

    Args:
      weights: A hub name, a .pth file, a converted folder, or a run folder or RUN@STEP.
      train: The labelled bank: folder:/path, idx:/path@train, tfds:NAME@train, shapes:N@train.
      test: The labelled images to classify.
      which: The network of the run to score; the teacher's features are the better ones.
      ks: Numbers of neighbours.
      temperature: Of the votes.
      resize: Pixels of the shorter side before the centre crop; unset, as the run says.
      crop: Pixels of the centre crop; unset, as the run says.
      canvas_size: Pixels; larger images are resized on the host, which is slower.
      batch_size: Images at a time over all devices.
      num_threads: Threads that decode images.
      max_unreadable: Share of the images that may be unreadable; they are left out.
      output: The JSON file to write: scores, settings, weights' hash, versions.

    Returns: `{k: {"top1": percent, "top5": percent}}`.
    Raises:
      UsageError: something cannot be loaded, opened or written, or a setting is out of range.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    for name in ("resize", "crop", "canvas_size", "batch_size", "num_threads"):
        if settings[name] is not None and settings[name] < 1:
            raise UsageError(f"{name}={settings[name]} must be at least 1")
    check_votes(ks, temperature)
    check_writable(output)
    sources = open_labelled(train, test)
    model, info = load(weights, which=which)
    if info.arch == "linear":
        raise UsageError(f"{weights} is a linear classifier: give the backbone below it")
    transform = EvalTransform(
        resize=resize or info.resize,
        crop=crop or info.crop,
        canvas_size=canvas_size,
        mean=info.mean,
        std=info.std,
    )
    settings |= {"resize": transform.resize, "crop": transform.crop}
    if transform.crop > min(transform.resize, transform.canvas_size):
        raise UsageError(
            f"crop={transform.crop} is larger than resize={transform.resize} or "
            f"canvas_size={canvas_size}: a crop must fit into both"
        )
    mesh = sharding.make_mesh()
    is_main = jax.process_index() == 0
    graphdef, *weights_here = split(model)
    params, batch_stats = jax.device_put(weights_here, sharding.replicated(mesh))
    feature_fn = feature_function(graphdef, transform, mesh)

    def features(source: Source) -> Features:
        with tqdm(total=len(source), desc=source.spec, unit=" images", disable=not is_main) as bar:
            return extract(
                lambda batch: feature_fn(params, batch_stats, batch),
                Records(source, max_unreadable=max_unreadable, channels=len(info.mean)),
                transform,
                batch_size=batch_size,
                num_threads=num_threads,
                mesh=mesh,
                on_batch=bar.update,
            )

    sides = [features(source) for source in sources]
    scores = knn_of_sources(*sources, *sides, ks=ks, temperature=temperature)
    unreadable = {s.spec: len(s) - len(side.index) for s, side in zip(sources, sides, strict=True)}
    if is_main:
        rows = [[k, f"{row['top1']:.2f}", f"{row['top5']:.2f}"] for k, row in scores.items()]
        print(table(["k", "top-1 %", "top-5 %"], rows))
        for spec, count in unreadable.items():
            if count:
                print(f"{count} images of {spec} cannot be read and were left out")
        metrics = {"knn": scores, "unreadable_images": unreadable}
        write_results(output, "knn", metrics, settings, info)
    return scores
