"""DINO on Fashion-MNIST (60,000 grey images of 28x28 pixels), sized for two CPU cores.

python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

k-NN accuracy (first 2,000 test images, first 10,000 training images) for k = 10 / 20: 62.6 / 62.2
untrained, 81.1 / 81.3 after 15 epochs, which take half an hour; raw pixels give 81.1 (k = 20). With
all 10,000 test and 60,000 training images: 84.4 / 84.2, and 85.4 by logistic regression.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dino_jax.configs import default

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def source(split: str) -> str:
    """Debian's copy if it is installed, else TensorFlow Datasets'."""
    return f"idx:{DEBIAN}@{split}" if DEBIAN.is_dir() else f"tfds:fashion_mnist@{split}"


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config()
    config.model.update(name="vit_tiny", patch_size=7, drop_path_rate=0.0)
    config.model.overrides.update(image_size=28, embed_dim=128, depth=4, num_heads=4)
    config.head.update(out_dim=1024, hidden_dim=512, bottleneck_dim=128)
    # The outline identifies a garment: large crops, and no colour changes.
    config.crops.update(global_size=28, global_scale=(0.6, 1.0))
    config.crops.update(local_size=14, local_number=2, local_scale=(0.25, 0.6))
    config.crops.update(hue=0.0, saturation=0.0, gray_prob=0.0, solarize_prob=0.0)
    config.crops.update(blur_prob=(0.5, 0.1, 0.2), blur_radius=(0.1, 0.6))
    config.data.update(train=source("train"), canvas_size=28, num_threads=2)
    config.train.update(batch_size=64, epochs=15)
    # For a short run of a small model: high learning rate, fast teacher, constant weight decay.
    config.optim.update(lr=0.008, warmup_epochs=1, momentum_teacher=0.99, freeze_last_layer=0)
    config.optim.weight_decay_end = 0.04
    config.log.every_steps = 100
    config.eval.update(
        knn_every_epochs=1,
        knn_at_start=True,
        knn_train=source("train") + "[:10000]",
        knn_test=source("test") + "[:2000]",
        knn_ks=(10, 20),
        resize=28,
        crop=28,
        canvas_size=28,
    )
    return default.apply_argument(config, arg)
