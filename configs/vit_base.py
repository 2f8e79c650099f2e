"""DINO ViT-B/16, 400 epochs, batch size 1024: k-NN 76.1, linear 78.2 on ImageNet.

python main.py --config=configs/vit_base.py --workdir=runs/b16 --config.data.train=folder:/imagenet/train

The scores are those of the released weights. `python -m dino_jax inspect dino_vitb16 --what=full`
shows their exact training arguments; this config follows the paper and the reference's documentation.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default, vit_small


def get_config(arg: str = "") -> ConfigDict:
    config = vit_small.get_config()
    config.model.name = "vit_base"
    config.train.update(batch_size=1024, epochs=400)
    config.optim.clip_grad = 0.3  # helps large models
    config.loss.update(teacher_temp=0.07, warmup_teacher_temp_epochs=50)
    return default.apply_argument(config, arg)
