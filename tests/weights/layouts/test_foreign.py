"""Networks of other projects are recognized by their tensors."""

import json

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.weights.layouts.architecture import infer
from dino_jax.weights.layouts.foreign import project_of
from dino_jax.weights.layouts.torch_checkpoint import TorchNetwork
from tests.conftest import GOLDENS

VIT = "cls_token pos_embed patch_embed.proj.weight blocks.0.norm1.weight norm.bias "
HUGGING_FACE = "embeddings.cls_token embeddings.patch_embeddings.projection.weight "


@pytest.mark.parametrize(
    ("names", "project"),
    [
        (VIT + "mask_token blocks.0.ls1.gamma", "DINOv2"),
        (VIT + "blocks.0.ls1.gamma register_tokens", "DINOv2"),
        (VIT + "blocks.0.3.ls2.gamma mask_token", "DINOv2"),  # in chunks
        (VIT + "blocks.0.ls1.gamma reg_token", "DINOv2"),  # timm
        (VIT + "blocks.0.ls1.gamma", "DINOv2 or another ViT with LayerScale"),
        (VIT + "storage_tokens mask_token blocks.0.ls1.gamma", "DINOv3"),
        (VIT + "rope_embed.periods blocks.0.ls1.gamma", "DINOv3"),
        (VIT + "mask_token decoder_pos_embed decoder_embed.weight", "MAE with its decoder"),
        (VIT + "decoder_blocks.0.norm1.weight", "MAE with its decoder"),
        ("base_encoder.cls_token momentum_encoder.cls_token predictor.0.weight", "MoCo-v3"),
        ("encoder_q.conv1.weight encoder_k.conv1.weight", "MoCo"),
        (VIT + "dino_head.mlp.0.weight ibot_head.mlp.0.weight", "DINOv2"),
        (VIT + "dist_token", "a distilled DeiT"),
        (VIT + "masked_embed", "iBOT"),
        (VIT + "head.mlp.0.weight head.last_layer2.weight_v", "iBOT"),
        (VIT + "blocks.0.gamma_1 blocks.0.attn.q_bias", "BEiT"),
        (VIT + "visual.conv1.weight visual.class_embedding logit_scale", "a network of CLIP"),
        ("vision_model.embeddings.class_embedding", "a network of CLIP"),
        (
            HUGGING_FACE + "encoder.layer.0.attention.attention.query.weight",
            "a ViT from Hugging Face",
        ),
        ("vit." + HUGGING_FACE + "classifier.weight", "a ViT from Hugging Face"),
        (HUGGING_FACE + "encoder.layer.0.layer_scale1.lambda1", "DINOv2 from Hugging Face"),
        (HUGGING_FACE + "layer.0.attention.q_proj.weight", "DINOv3 from Hugging Face"),
        (HUGGING_FACE + "encoder.layer.0.lambda_1", "BEiT from Hugging Face"),
        ("_flat_param", "a network flattened by FSDP"),
        ("blocks.0.flat_param_0 cls_token", "a network flattened by FSDP"),
        ("encoder.layers.encoder_layer_0.ln_1.weight class_token", "a ViT of torchvision"),
        ("layers.0.blocks.0.attn.relative_position_index", "a Swin Transformer"),
        ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt"),
    ],
)
def test_projects(names: str, project: str) -> None:
    tensors = {name: np.ones(1, np.float32) for name in names.split()}
    assert project_of(tensors).name == project
    with pytest.raises(UsageError, match=f"these are the tensors of {project}, which is not"):
        infer(TorchNetwork(tensors, {}))


def test_released_networks_are_ours() -> None:
    for names in json.loads((GOLDENS / "manifests.json").read_text()).values():
        assert project_of(names) is None
