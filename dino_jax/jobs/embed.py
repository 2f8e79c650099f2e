"""The embed job: writes features of any images to a file."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from flax import nnx
from tyro.conf import arg

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.embedding_files import FORMATS, check_embedding_format, names_file
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import BlockTokens, ClassToken, Feature
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths


@local_paths
def embed(
    weights: str,
    data: str,
    output: Path,
    tokens: Literal["class", "patches", "all"] = "class",
    block: int = -1,
    options: Annotated[Extraction, arg(name="")] = Extraction(),
) -> dict[str, Any]:
    """Writes the features of all images to a file, with their names.

    The images are streamed: apart from their names, a million images need no more memory than a
    thousand. Unreadable images are logged and skipped.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      data: The images, with or without labels: folder:/path, idx:/path@train, tfds:NAME@train, ...
      output: FILE.npy (the names go to FILE.csv) or FILE.parquet. Settings and the weights' hash
        go to FILE.json. Existing files are overwritten.
      tokens: The class token, the patch tokens, or all of them (class token first).
      block: Block of a ViT: -1 is the last, 0 the first. The final norm is always applied.
      options: How features are computed.

    Returns: number of `images` written, and the `shape` of a feature.
    Raises:
      UsageError: something cannot be loaded, opened or written, or the backbone has no such tokens.
    """
    check_embedding_format(output)
    about = output.with_suffix(".json")
    for path in (output, names_file(output), about):
        check_writable(path)
    source = open_source(data)
    extractor = Extractor(weights, options)
    feature = chosen_feature(extractor.model, tokens, block)
    shape = extractor.feature_shape(feature)
    is_main = jax.process_index() == 0
    sink = FORMATS[output.suffix](output, shape) if is_main else nullcontext()
    images = 0
    with sink as append:
        for part in extractor.stream(feature, source):
            images += len(part.index)
            if append is not None:
                append(part, [source.name(int(i)) for i in part.index])
    metrics = {"images": images, "shape": list(shape)}
    settings = {"weights": weights, "data": data, "tokens": tokens, "block": block}
    size = " x ".join(map(str, (images, *shape)))
    report(
        about,
        "embed",
        metrics | {"unreadable_images": extractor.unreadable},
        settings | extractor.settings(feature),
        extractor.info,
        notes=[f"features of {source.spec} written to {output}: {size}"],
        unreadable=extractor.unreadable,
    )
    return metrics


def chosen_feature(model: nnx.Module, tokens: str, block: int) -> Feature:
    """The feature to write.

    Raises:
      UsageError: there is no such block.
    """
    if (tokens, block) == ("class", -1):
        return ClassToken()  # every backbone has it
    if not hasattr(model, "get_intermediate_layers"):
        return BlockTokens(tokens)  # its error message explains why it has none
    depth = len(model.blocks)
    if not -depth <= block < depth:
        raise UsageError(
            f"block={block} must be from 0 to {depth - 1}, or from -1 (the last) to -{depth}: the "
            f"backbone has {depth} blocks"
        )
    return BlockTokens(tokens, from_last=depth - block if block >= 0 else -block)
