"""The networks of DINO in plain PyTorch, written from the paper.

Modules have the names of the package's, so that weights are copied by name. There is no stochastic
depth, because the losses of all sides must agree.

Dims: B images, V views, N tokens, D width, h heads, K prototypes.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        b, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, h, N, N]
            mixed = weights.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden_dim: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads, fused), Mlp(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def timm_block(dim: int, num_heads: int, hidden_dim: int) -> nn.Module:
    """The block of timm's ViT, whose parts have the same names."""
    from timm.models.vision_transformer import Block as TimmBlock

    norm = partial(nn.LayerNorm, eps=1e-6)
    return TimmBlock(dim, num_heads, hidden_dim / dim, qkv_bias=True, norm_layer=norm)


# Called with width, heads and hidden width.
BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "plain": partial(Block, fused=False),
    "fused": partial(Block, fused=True),
    "timm": timm_block,
}


class VisionTransformer(nn.Module):
    def __init__(self, sizes: dict[str, Any], block: str) -> None:
        super().__init__()
        dim, patch = sizes["embed_dim"], sizes["patch_size"]
        self.table_side = sizes["image_size"] // patch
        self.patch_embed = nn.Conv2d(sizes["in_channels"], dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.table_side**2, dim))
        shape = dim, sizes["num_heads"], sizes["mlp_dim"]
        self.blocks = nn.ModuleList(BLOCKS[block](*shape) for _ in range(sizes["depth"]))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table [1, 1 + rows * columns, D], resized if the grid differs."""
        side = self.table_side
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = (rows + 0.1) / side, (columns + 0.1) / side
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D], the class token."""
        x = self.patch_embed(images)
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class WeightNormLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(out_features, in_features))
        self.g = nn.Parameter(torch.ones(out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.v, self.g, 0))


class Head(nn.Module):
    def __init__(self, widths: list[int], prototypes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.last_layer = WeightNormLinear(widths[-1], prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, K]."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.last_layer(F.normalize(self.layers[-1](x), eps=1e-12))


class MultiCrop(nn.Module):
    """Runs the backbone once for each size of views, and the head once for all."""

    def __init__(self, sizes: dict[str, Any], block: str) -> None:
        super().__init__()
        self.backbone = VisionTransformer(sizes, block)
        self.head = Head(sizes["head_widths"], sizes["out_dim"])

    def forward(self, views: list[Tensor]) -> Tensor:
        """V tensors [B, C, H, W], those of one size adjacent -> [V * B, K], view by view."""
        by_size = itertools.groupby(views, key=lambda view: view.shape[-1])
        return self.head(torch.cat([self.backbone(torch.cat(list(group))) for _, group in by_size]))
