"""The small images of the tests of linear classifiers."""

from dino_jax.evaluate.features.extractor import Extraction

OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=32, num_threads=2)
TEST = "shapes:40@test"
