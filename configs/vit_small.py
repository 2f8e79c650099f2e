"""DINO ViT-S/16, 100 epochs, batch size 512: k-NN 69.3, linear 74.0 on ImageNet.

python main.py --config=configs/vit_small.py --workdir=runs/s16 --config.data.train=folder:/imagenet/train

The scores are the reference's with these settings on 8 V100 GPUs (1.75 days). For k-NN scores during
training add --config.eval.knn_every_epochs=10 --config.eval.knn_test=folder:/imagenet/val.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config()
    config.model.name = "vit_small"
    config.train.update(batch_size=512, epochs=100)
    return default.apply_argument(config, arg)
