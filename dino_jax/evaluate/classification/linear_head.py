"""Scores a trained linear classifier, after checking that it matches features and images."""

from typing import Any

from dino_jax.data.sources import Source
from dino_jax.errors import UsageError, listed
from dino_jax.evaluate.classification.labelled import classes_of, num_classes_of, renumbered
from dino_jax.evaluate.classification.linear import Heads, score_heads
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extractor
from dino_jax.evaluate.features.tokens import Feature
from dino_jax.weights.info import WeightsInfo
from dino_jax.weights.linear import LinearHead


def score_classifier(
    head: LinearHead,
    name: str,
    extractor: Extractor,
    feature: Feature,
    test: Source,
    cache: FeatureCache,
) -> dict[str, Any]:
    """Scores a trained classifier.

    Args:
      head: the classifier.
      name: of its file.
      extractor: computes the features.
      feature: the feature to classify.
      test: labelled images.
      cache: where their features are stored.
    Returns: `loss`, `top1`, `top5` and `classes_without_test_images`.
    Raises:
      UsageError: see `check_head`.
    """
    check_head(head, name, extractor.info, feature, extractor.feature_shape(feature)[0], test)
    (found,) = extractor.features(feature, [test], cache)
    labels = renumbered(found.labels, test, head.class_names)
    scores = score_heads(Heads(head.kernel[None], head.bias[None]), found.features, labels)
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
    """Checks that a classifier matches a backbone, a feature and images.

    Args:
      head: the classifier.
      name: of its file.
      info: of the backbone.
      feature: the feature to classify.
      width: of that feature.
      test: the images.
    Raises:
      UsageError: it was trained on other weights, features or classes.
    """
    if head.weights not in (None, info.sha256):
        raise UsageError(
            f"evaluate={name} was trained on weights {head.weights[:12]}..., not on "
            f"{info.sha256[:12]}... ({info.source}): use the weights it was trained on"
        )
    if head.feature not in (None, repr(feature)) or len(head.kernel) != width:
        made_for = head.feature or "unknown"
        raise UsageError(
            f"evaluate={name} expects {len(head.kernel)} features ({made_for}), but {feature} of "
            f"{info.arch} has {width}: set n_last_blocks and avgpool_patchtokens as in its "
            "training, or use a classifier of these weights"
        )
    if head.class_names is not None:
        names = classes_of(test) if test.class_names else {"numbers without names"}
        unknown = sorted(names - set(head.class_names))
        if unknown:
            raise UsageError(
                f"{test.spec} has classes that evaluate={name} was not trained on "
                f"({listed(unknown)}): use other test images"
            )
        return
    classes, known = num_classes_of(test), head.kernel.shape[1]
    # Without names, a slice of a source does not show how many classes there are.
    if classes > known or (test.class_names and classes < known):
        raise UsageError(
            f"evaluate={name} has {known} classes, but {test.spec} has {classes}: "
            "use a classifier and images of the same classes"
        )
