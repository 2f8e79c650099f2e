"""All settings of a training run, with units, and advice on when to change them.

python main.py --config=configs/default.py --workdir=runs/default --config.data.train=folder:/path

The defaults are the reference's, which train ViT-S/16 for 100 epochs (k-NN 69.3 on ImageNet with 8
GPUs; see vit_small.py). Set any of them on the command line, for example --config.optim.lr=0.001.
Append `:debug` to a config's path for a run that takes seconds.
"""

from ml_collections import ConfigDict, config_dict

from dino_jax.data.decode import MAX_PIXELS
from dino_jax.data.transforms.color import IMAGENET_MEAN, IMAGENET_STD
from dino_jax.errors import UsageError


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # for weights, data order, crops and stochastic depth

    # Initial weights instead of random ones: a hub name, a .pth file, a converted folder, a run, or
    # RUN@STEP. The log lists what was loaded. A lower optim.lr stays closer to these weights.
    config.init_from = config_dict.placeholder(str)

    config.model = ConfigDict()
    config.model.name = "vit_small"  # a ViT, an XCiT or a ResNet of dino_jax.models.MODELS
    # Pixels; for ViTs only, by default 16. 8 gives better features but is about five times as slow.
    config.model.patch_size = config_dict.placeholder(int)
    config.model.drop_path_rate = 0.1  # stochastic depth of the student's last block; ResNets: 0
    config.model.dtype = "auto"  # compute: float32, bfloat16; auto: float32 on CPUs, else bfloat16
    # Attention kernel of a ViT: xla, cudnn (bfloat16 on a GPU), or auto, which is cudnn if a check at
    # the start of the run shows that its results are correct.
    config.model.attention = "auto"
    config.model.remat = "none"  # recompute to save memory: none, dots (some), full (most)
    config.model.overrides = ConfigDict()  # sizes; if unset, those of the architecture
    config.model.overrides.image_size = config_dict.placeholder(int)  # pixels, a ViT's positions
    config.model.overrides.embed_dim = config_dict.placeholder(int)
    config.model.overrides.depth = config_dict.placeholder(int)  # blocks
    config.model.overrides.num_heads = config_dict.placeholder(int)
    config.model.overrides.mlp_ratio = config_dict.placeholder(float)

    config.head = ConfigDict()
    config.head.out_dim = 65536  # prototypes K; fewer for small data
    config.head.hidden_dim = 2048
    config.head.bottleneck_dim = 256
    config.head.num_layers = 3
    config.head.use_bn = False  # BatchNorm before each GELU
    config.head.weight_norm = True  # of the prototypes; the released ResNet-50 has False
    config.head.norm_last_layer = True  # False: a bit better with vit_small, unstable with others

    config.loss = ConfigDict()
    config.loss.student_temp = 0.1
    config.loss.teacher_temp = 0.04  # after the warm-up; values above about 0.07 are unstable
    config.loss.warmup_teacher_temp = 0.04  # in the first epoch; lower it if the loss stays at ln K
    config.loss.warmup_teacher_temp_epochs = 0
    config.loss.center_momentum = 0.9  # share of the old center kept each step

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw, sgd (for ResNets), lars (for very large batches)
    config.optim.lr = 0.0005  # after the warm-up, for batch size 256; scaled by batch_size / 256
    config.optim.min_lr = 1e-6  # at the end; not scaled
    config.optim.warmup_epochs = 10
    config.optim.weight_decay = 0.04  # at the start
    config.optim.weight_decay_end = 0.4  # at the end; follows a cosine
    config.optim.clip_grad = 3.0  # norm per parameter's gradient; 0.3 helps large models; 0: off
    config.optim.freeze_last_layer = 1  # epochs; more if the loss does not decrease
    config.optim.momentum_teacher = 0.996  # at the start; follows a cosine to 1; batch 256: 0.9995
    config.optim.accumulation_steps = 1  # micro-batches per step; more save memory, same result

    config.crops = ConfigDict()
    config.crops.global_size = 224  # pixels
    config.crops.global_scale = (0.4, 1.0)  # share of area; (0.14, 1) without local crops
    config.crops.local_size = 96  # pixels
    config.crops.local_number = 8  # 0: train on the two global crops only
    config.crops.local_scale = (0.05, 0.4)
    config.crops.aspect_ratio = (3 / 4, 4 / 3)  # width over height of a crop's box
    config.crops.flip_prob = 0.5
    config.crops.jitter_prob = 0.8
    config.crops.brightness = 0.4
    config.crops.contrast = 0.4
    config.crops.saturation = 0.2
    config.crops.hue = 0.1  # largest shift, as a share of the colour circle
    config.crops.gray_prob = 0.2
    config.crops.blur_prob = (1.0, 0.1, 0.5)  # first global, second global, local crops
    config.crops.blur_radius = (0.1, 2.0)  # pixels
    config.crops.solarize_prob = 0.2  # second global crop only
    config.crops.mean = IMAGENET_MEAN  # per channel, on the scale 0..1
    config.crops.std = IMAGENET_STD

    config.data = ConfigDict()
    config.data.train = config_dict.placeholder(str)  # KIND:LOCATION[@SPLIT], or a folder
    config.data.canvas_size = 512  # pixels; larger images are shrunk to fit when decoded
    config.data.num_threads = 16  # threads that decode images
    # Share of the images that a process may find unreadable before the run stops; at least ten may.
    config.data.max_unreadable = 0.05
    config.data.max_pixels = MAX_PIXELS  # larger images are unreadable; at most Pillow's limit

    config.train = ConfigDict()
    config.train.batch_size = 512  # images per step, over all devices
    config.train.epochs = 100
    config.train.sharding = "dp"  # dp: replicate the state on every device; fsdp: shard it

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # in addition to the end of each epoch; 0: epochs only
    config.checkpoint.keep_every_epochs = 20  # kept permanently, in addition to the latest

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps per line of metrics and diagnosis
    config.log.attention_sheet = 0  # images on attention.png, drawn at the end; 0: none

    config.eval = ConfigDict()
    config.eval.knn_every_epochs = 0  # 0: never
    config.eval.knn_at_start = False  # also evaluate the untrained network, for comparison
    config.eval.knn_train = config_dict.placeholder(str)  # labelled images; by default data.train
    config.eval.knn_test = config_dict.placeholder(str)  # labelled images to classify
    config.eval.knn_ks = (10, 20, 100, 200)
    config.eval.knn_temperature = 0.07
    config.eval.resize = 256  # pixels; shorter side before the centre crop
    config.eval.crop = 224  # pixels
    config.eval.canvas_size = 512  # pixels
    config.eval.batch_size = 256

    return apply_argument(config, arg)


def apply_argument(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies the part of a config's path after the colon: `debug`, or nothing."""
    if arg == "debug":
        shrink(config)
    elif arg:
        raise UsageError(f"unknown config argument {arg!r}: use 'debug', or omit it")
    return config


def shrink(config: ConfigDict) -> None:
    """Shrinks a config so that any machine runs it within a minute; the model learns little."""
    _shrink_model(config.model)
    config.head.update(out_dim=256, hidden_dim=64, bottleneck_dim=32)
    config.crops.update(global_size=32, local_size=16, local_number=2)
    config.data.update(train="shapes:256@train", canvas_size=64, num_threads=2)
    config.train.update(batch_size=32, epochs=2)
    config.optim.warmup_epochs = 1
    config.loss.warmup_teacher_temp_epochs = min(config.loss.warmup_teacher_temp_epochs, 1)
    config.log.every_steps = 4
    config.eval.update(
        knn_every_epochs=1,
        knn_train="shapes:256@train",
        knn_test="shapes:128@test",
        knn_ks=(10, 20),
        resize=32,
        crop=32,
        canvas_size=64,
        batch_size=64,
    )


def _shrink_model(model: ConfigDict) -> None:
    if "resne" in model.name:  # including wide ResNets and ResNeXts
        model.name = "resnet18"
        return
    model.overrides.update(embed_dim=48, depth=2, num_heads=3)
    if not model.name.startswith("xcit"):
        model.patch_size = 8
        model.overrides.image_size = 32
