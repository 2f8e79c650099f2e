"""DINO ResNet-50, trained with SGD: k-NN 67.5, linear 75.3 on ImageNet.

python main.py --config=configs/resnet50.py --workdir=runs/resnet50 --config.data.train=folder:/imagenet/train

The scores are those of the released weights, which were trained differently: their head has two
layers of width 4096, and prototypes without weight normalisation. Optimizer, learning rate, weight
decay and crop scales are the reference's recommendation for ResNets; batch size and epochs are those
of vit_small.py.
"""

from ml_collections import ConfigDict

from dino_jax.configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config()
    config.model.update(name="resnet50", drop_path_rate=0.0)  # ResNets have no stochastic depth
    config.train.update(batch_size=512, epochs=100)
    config.optim.update(name="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4)
    config.crops.update(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14))
    return default.apply_argument(config, arg)
