"""DINO ViT-B/8, 300 epochs, batch size 1024: k-NN 77.4, linear 80.1 on ImageNet.

python main.py --config=configs/vit_base8.py --workdir=runs/b8 --config.data.train=folder:/imagenet/train

The scores are those of the released weights. `python -m dino_jax inspect dino_vitb8 --what=full`
shows their exact training arguments; this config follows the paper and the reference's documentation.
It uses `remat` and `fsdp`, because it needs far more memory than vit_base.py.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default, vit_base


def get_config(arg: str = "") -> ConfigDict:
    config = vit_base.get_config()
    config.model.update(patch_size=8, remat="dots")
    config.train.update(epochs=300, sharding="fsdp")
    return default.apply_argument(config, arg)
