"""Recognizes the networks of other projects by the names of their tensors.

A row of `PROJECTS` is a project, the patterns that prove it (each must occur in a name), and the
way out. The first match wins.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_DEFAULT = (
    "give a backbone or a full checkpoint of the original DINO, a plain ViT or XCiT with the same "
    "names, or a torchvision ResNet"
)


class Project(NamedTuple):
    """Another project, and the tensors that identify it."""

    name: str
    proof: tuple[str, ...]
    way_out: str = _DEFAULT


PROJECTS = (
    Project(
        "a network flattened by FSDP",
        (r"(^|\.)_?flat_param(_\d+)?$",),
        "save its full state dict with torch (StateDictType.FULL_STATE_DICT)",
    ),
    Project("a Swin Transformer", (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position",)),
    Project("a network of CLIP", (r"(^|\.)visual\.(conv1|class_embedding|transformer|trunk)\b",)),
    Project("a network of CLIP", (r"(^|\.)(text_model|vision_model)\.(embeddings|encoder)\.",)),
    Project("DINOv3 from Hugging Face", (r"layer\.\d+\.attention\.[qkv]_proj\.", r"embeddings\.")),
    Project("DINOv2 from Hugging Face", (r"layer\.\d+\.layer_scale1\.lambda1$", r"embeddings\.")),
    Project("BEiT from Hugging Face", (r"layer\.\d+\.lambda_1$", r"embeddings\.")),
    Project("a ViT from Hugging Face", (r"(^|\.)embeddings\.(cls_token|patch_embeddings)\b",)),
    Project("DINOv3", (r"(^|\.)(storage_tokens|rope_embed\.periods)$",)),
    Project("DINOv3", (r"\.attn\.qkv\.bias_mask$",)),
    Project("DINOv2", (r"(^|\.)(register_tokens|reg_token)$",)),
    Project("DINOv2", (r"(^|\.)(dino_head|ibot_head)\.",)),
    Project("a distilled DeiT", (r"(^|\.)dist_token$",)),
    Project("DINOv2", (r"blocks\.(\d+\.)+ls[12]\.gamma$", r"(^|\.)mask_token$")),
    Project("DINOv2 or another ViT with LayerScale", (r"blocks\.(\d+\.)+ls[12]\.gamma$",)),
    Project(
        "BEiT",
        (r"blocks\.\d+\.(gamma_1|attn\.q_bias|attn\.relative_position_bias_table)$",),
    ),
    Project(
        "MAE with its decoder",
        (r"(^|\.)decoder_(pos_embed|embed|blocks|norm|pred)\b",),
        "save its encoder alone: torch.save({name: x for name, x in weights.items() if not "
        "name.startswith(('decoder_', 'mask_token'))}, FILE)",
    ),
    Project(
        "MoCo-v3",
        (r"(^|\.)(base|momentum)_encoder\.",),
        "save its encoder alone: torch.save({name.split('momentum_encoder.')[1]: x for name, x in "
        "weights.items() if 'momentum_encoder.' in name and '.head.' not in name}, FILE); its "
        "ViT-S has 12 heads (num_heads, --num-heads)",
    ),
    Project("MoCo", (r"(^|\.)encoder_[qk]\.",)),
    Project(
        "iBOT",
        (r"(^|\.)masked_embed$|(^|\.)head\.(mlp2|last_layer2)\b",),
        "save its backbone alone, without masked_embed and head",
    ),
    Project("a ViT of torchvision", (r"encoder\.layers\.encoder_layer_\d+\.",)),
    Project("a ConvNeXt", (r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw|gamma$)",)),
)


def project_of(names: Iterable[str]) -> Project | None:
    """The project that the tensors come from; None if it is unknown, or the original DINO."""
    text = list(names)
    for project in PROJECTS:
        if all(any(re.search(pattern, name) for name in text) for pattern in project.proof):
            return project
    return None
