"""A finished linear classifier: whether it fits, and its scores."""

from typing import Any

from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError, listed
from dino_jax.evaluate.classification.labelled import classes_of, num_classes_of, renumbered
from dino_jax.evaluate.classification.linear import score_heads
from dino_jax.evaluate.classification.linear_files import LinearHead
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extractor
from dino_jax.evaluate.features.tokens import Feature
from dino_jax.weights.load import WeightsInfo


def score_classifier(
    head: LinearHead,
    name: str,
    extractor: Extractor,
    feature: Feature,
    test: Source,
    cache: FeatureCache,
) -> dict[str, Any]:
    """The scores of a finished classifier.

    Args:
      head: the classifier.
      name: of its file.
      extractor: of the backbone.
      feature: what is classified.
      test: labelled images.
      cache: where their features are kept.
    Returns: `loss`, `top1`, `top5` and `classes_without_test_images`.
    Raises:
      UsageError: it does not fit, see `check_head`.
    """
    check_head(head, name, extractor.info, feature, extractor.feature_shape(feature)[0], test)
    (found,) = extractor.features(feature, [test], cache)
    labels = renumbered(found.labels, test, head.class_names)
    scores = score_heads(head.heads, found.features, labels)
    return {metric: float(values[0]) for metric, values in scores.items()} | {
        "classes_without_test_images": len(head.bias) - len(classes_of(test))
    }


def check_head(
    head: LinearHead,
    name: str,
    info: WeightsInfo,
    feature: Feature,
    width: int,
    test: Source,
) -> None:
    """Finds a classifier that does not fit.

    Args:
      head: the classifier.
      name: of its file.
      info: of the backbone.
      feature: that is to be classified.
      width: of that feature.
      test: the images.
    Raises:
      UsageError: it is of other weights or features, or knows other classes.
    """
    if head.weights not in (None, info.sha256):
        raise UsageError(
            f"evaluate={name} was trained on weights {head.weights[:12]}..., not on "
            f"{info.sha256[:12]}... ({info.source}): give the weights that it belongs to"
        )
    if head.feature not in (None, repr(feature)) or len(head.kernel) != width:
        made_for = head.feature or "others"
        raise UsageError(
            f"evaluate={name} takes {len(head.kernel)} features ({made_for}), but {feature} of "
            f"{info.arch} has {width}: set n_last_blocks and avgpool_patchtokens as when it was "
            "trained, or give the head of these weights"
        )
    if head.class_names is not None:
        names = classes_of(test) if test.class_names else {"numbers without names"}
        unknown = sorted(names - set(head.class_names))
        if unknown:
            raise UsageError(
                f"{test.spec} has classes that evaluate={name} does not know "
                f"({listed(unknown)}): give test images of the classes it was trained on"
            )
        return
    classes, known = num_classes_of(test), head.kernel.shape[1]
    # Without names a part of a source does not tell how many classes the whole has.
    if classes > known or (test.class_names and classes < known):
        raise UsageError(
            f"evaluate={name} knows {known} classes, {test.spec} has {classes}: "
            "give a head and images of the same classes"
        )
