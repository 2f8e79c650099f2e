"""DINO on Fashion-MNIST (60,000 grey images of 28x28 pixels), made for two CPU cores.

python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import default

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def source(split: str) -> str:
    """Debian's copy where it is installed, else that of TensorFlow Datasets."""
    return f"idx:{DEBIAN}@{split}" if DEBIAN.is_dir() else f"tfds:fashion_mnist@{split}"


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config()
    config.model.update(name="vit_tiny", patch_size=4)
    config.model.overrides.update(image_size=32, embed_dim=96, depth=4, num_heads=3)
    config.head.update(out_dim=1024, hidden_dim=512, bottleneck_dim=128)
    config.crops.update(global_size=32, local_size=16, local_number=4)
    config.data.update(train=source("train"), canvas_size=28, num_threads=2)
    config.train.update(batch_size=128, epochs=10)
    config.optim.update(lr=0.002, warmup_epochs=1, momentum_teacher=0.99)
    config.eval.update(
        knn_every_epochs=1,
        knn_at_start=True,
        knn_train=source("train") + "[:10000]",
        knn_test=source("test") + "[:2000]",
        knn_ks=(10, 20),
        resize=32,
        crop=32,
        canvas_size=32,
    )
    return default.apply_argument(config, arg)
