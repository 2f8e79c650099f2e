"""DINO ViT-S/8, 800 epochs, batch size 1024: k-NN 78.3, linear 79.7 on ImageNet.

python main.py --config=configs/vit_small8.py --workdir=runs/s8 --config.data.train=folder:/imagenet/train

The scores are those of the released weights. `python -m dino_jax inspect dino_vits8 --what=full`
shows their exact training arguments; this config follows the paper and the reference's documentation.
Patches of 8 pixels give four times as many tokens as in vit_small.py. If memory is insufficient, set
--config.model.remat=dots or full, or --config.optim.accumulation_steps.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default, vit_small


def get_config(arg: str = "") -> ConfigDict:
    config = vit_small.get_config()
    config.model.patch_size = 8
    config.train.update(batch_size=1024, epochs=800)
    config.loss.update(teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    config.head.norm_last_layer = False  # stable with vit_small only
    return default.apply_argument(config, arg)
