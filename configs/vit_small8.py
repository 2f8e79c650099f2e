"""DINO ViT-S/8, 800 epochs, 1024 images a step: k-NN 78.3, linear 79.7 on ImageNet.

python main.py --config=configs/vit_small8.py --workdir=runs/s8 --config.data.train=folder:/imagenet/train

The scores are those of the released weights, whose exact arguments lie in their full checkpoint
(`args`); this recipe follows the advice of the paper and the reference's documentation.
Patches of 8 pixels mean four times the tokens of vit_small.py; when memory is short, set
--config.model.remat=dots or full, or --config.optim.accumulation_steps.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default, vit_small


def get_config(arg: str = "") -> ConfigDict:
    config = vit_small.get_config()
    config.model.patch_size = 8
    config.train.update(batch_size=1024, epochs=800)
    config.loss.update(teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    config.head.norm_last_layer = False  # safe with vit_small only
    return default.apply_argument(config, arg)
