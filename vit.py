"""A compact vision transformer around any attention, and MODELS, the table of named models.

    model = build_model("vitdiff", image_size=28, in_channels=1, num_classes=10)

Dosovitskiy et al. 2020 (arXiv 2010.11929), pre-norm, with the names of timm's state dict.
"""

import inspect
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from diff_attention import (DiffAttention, DiffAttentionV2, SizeError, check_heads, merge_heads, softmax_attention,
                            softmax_map, split_heads)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762): tokens (B, N, dim) -> (B, N, dim).

    Args:
        dim: width of the tokens.
        num_heads: heads H, of width dim / H.
        depth: not used; here so that every attention is called alike.
        qkv_bias, proj_bias: whether the projections have biases.

    Raises:
        SizeError: if the heads do not divide the width.
    """

    def __init__(self, dim, num_heads, depth=0, qkv_bias=False, proj_bias=True):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, x):
        """x (B, N, dim) -> q, k, v (B, H, N, dim / H)."""
        return (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))

    def attention_map(self, x):
        """The weights that multiply the values: x (B, N, dim) -> (B, H, N, N), rows sum to 1."""
        q, k, _ = self.project(x)
        return softmax_map(q, k)

    def branches(self, x):
        """The terms that a head adds up, of which self-attention has one: x (B, N, dim) -> [(B, H, N, dim / H)]."""
        return [softmax_attention(*self.project(x))]

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        return self.proj(merge_heads(softmax_attention(q[:, :, :keep], k, v)))


class PatchEmbed(nn.Module):
    """Cut images into patches and project each to a token: (B, C, H, W) -> (B, H W / patch_size^2, dim).

    A convolution whose stride is its kernel, computed as one product: the patches are rows of a matrix.
    """

    def __init__(self, patch_size, in_channels, dim, norm):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()

    def forward(self, images):
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, H/p * W/p, C p p)
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class Mlp(nn.Module):
    """fc2(dropout(gelu(fc1(x)))): (..., dim) -> (..., out_dim)."""

    def __init__(self, dim, hidden_dim, out_dim, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm transformer block around the module `attn`: (B, N, dim) -> (B, N, dim).

    With `keep`, only the first `keep` tokens are computed: (B, N, dim) -> (B, keep, dim). Of an attention whose
    forward takes no `keep`, the others are dropped after it.
    """

    def __init__(self, dim, mlp_dim, attn, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.attn_keeps = "keep" in offers(attn)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim, dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None):
        attended = self.attn(self.norm1(x), keep) if self.attn_keeps else self.attn(self.norm1(x))[:, :keep]
        x = x[:, :keep] + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm2(x)))


def sincos2d_pos_embed(side, dim, temperature=30):
    """Where each patch of a square grid is, as sines and cosines of its column and row: (side^2, dim), row by row.

    Four features share a frequency: sine and cosine of the column, sine and cosine of the row. As for the plain vision
    transformers of Beyer et al. 2022 (arXiv 2205.01580), but for the temperature: theirs, 10,000, is for larger grids.
    """
    frequencies = temperature ** -(torch.arange(math.ceil(dim / 4)) * 4 / dim)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.stack([angles.sin(), angles.cos()], dim=2)  # (side, frequencies, 2)
    across, down = waves.expand(side, -1, -1, -1), waves.unsqueeze(1).expand(-1, side, -1, -1)
    return torch.cat([across, down], dim=3).flatten(2).flatten(0, 1)[:, :dim]


class ViT(nn.Module):
    """Vision transformer: images (B, in_channels, image_size, image_size) -> logits (B, num_classes).

    Args:
        image_size, patch_size: pixels a side; the patch divides the image.
        in_channels, num_classes: 1 and 10 for grey digits.
        dim, depth, num_heads, mlp_dim: width of the tokens, blocks, heads, width of the hidden layer of a block.
        attention: whatever makes the attention of block i when called as
            attention(dim, num_heads, depth=i, qkv_bias=qkv_bias).
        head_hidden_dim: width of the classifier's hidden layer; 0 is a linear classifier.
        patch_norm: whether a LayerNorm follows the patch embedding.
        qkv_bias: whether q, k and v have biases.
        dropout: probability, on the embedded tokens, in the MLPs and on what each half of a block adds.

    Raises:
        SizeError: if a size is below 1, the patch does not divide the image, the heads do not divide the width, or the
            attention does not take these arguments; when called, if the images have another shape.
    """

    def __init__(self, image_size=28, patch_size=7, in_channels=1, num_classes=10, dim=32, depth=2, num_heads=2,
                 mlp_dim=128, attention=SelfAttention, head_hidden_dim=128, patch_norm=True, qkv_bias=False,
                 dropout=0.1):
        super().__init__()
        sizes = dict(image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
                     dim=dim, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
        for name, size in sizes.items():
            if size < 1:
                raise SizeError(f"{name} is {size}: it must be at least 1")
        if image_size % patch_size:
            raise SizeError(f"patch size {patch_size} does not divide image size {image_size}: "
                            f"choose one of {[p for p in range(1, image_size + 1) if image_size % p == 0]}")
        self.image_shape = (in_channels, image_size, image_size)
        side = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_channels, dim, norm=patch_norm)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(  # trained from there on
            torch.cat([0.02 * torch.randn(1, dim), sincos2d_pos_embed(side, dim)]).unsqueeze(0))
        self.dropout = nn.Dropout(dropout)
        try:
            inspect.signature(attention).bind(dim, num_heads, depth=0, qkv_bias=qkv_bias)
        except TypeError as error:
            raise SizeError(f"attention(dim, num_heads, depth=..., qkv_bias=...) is what makes each block's attention, "
                            f"and this one does not take that: {error}") from None
        self.blocks = nn.ModuleList(
            Block(dim, mlp_dim, attention(dim, num_heads, depth=i, qkv_bias=qkv_bias), dropout)
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = Mlp(dim, head_hidden_dim, num_classes) if head_hidden_dim else nn.Linear(dim, num_classes)

    def embed(self, images):
        """images (B, C, H, W) -> tokens (B, N, dim), the class token first."""
        # A trace has no number of a size to compare, and would warn of it.
        if not torch.jit.is_tracing() and images.shape[1:] != self.image_shape:
            raise SizeError(f"images {tuple(images.shape)} are not those of this model, (B, "
                            f"{', '.join(map(str, self.image_shape))})")
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # len() would fix the batch size in an export
        return self.dropout(torch.cat([cls_token, patches], dim=1) + self.pos_embed)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, keep=1)  # the head reads the class token alone
        return self.head(self.norm(x[:, 0]))

    def attention_inputs(self, images):
        """What each block's attention sees: images (B, C, H, W) -> pairs of (attention module, tokens (B, N, dim))."""
        x = self.embed(images)
        yield self.blocks[0].attn, self.blocks[0].norm1(x)
        for before, block in itertools.pairwise(self.blocks):
            x = before(x)
            yield block.attn, block.norm1(x)

    def attention_maps(self, images):
        """The signed attention maps: images (B, C, H, W) -> list of (B, H, N, N), one a block."""
        return [attn.attention_map(x) for attn, x in self.attention_inputs(images)]

    def attention_branches(self, images):
        """The terms that the heads add up, before any norm: images (B, C, H, W) -> for each block a list of
        (B, H, N, e), such as [A1 v, -lambda A2 v]. Every attention must have branches(x)."""
        return [attn.branches(x) for attn, x in self.attention_inputs(images)]

    def differential_blocks(self):
        """The numbers of the blocks whose attention has a mean_lambda."""
        return [i for i, block in enumerate(self.blocks) if "mean_lambda" in offers(block.attn)]

    def mean_lambdas(self, images):
        """The mean weight of the second branch, images (B, C, H, W) -> list of scalars, one a differential block."""
        numbers = self.differential_blocks()
        if not any("mean_lambda of tokens" in offers(self.blocks[i].attn) for i in numbers):
            return [self.blocks[i].attn.mean_lambda() for i in numbers]
        return [attn.mean_lambda(x) for i, (attn, x) in enumerate(self.attention_inputs(images)) if i in numbers]


def offers(attn):
    """What an attention has besides forward(x), which is all that it must have: a set of

        keep            forward(x, keep) computes the first `keep` tokens alone
        attention_map   attention_map(x): the signed weights that multiply the values, (B, H, N, N)
        branches        branches(x): the terms that each head adds up. One that is inherited does not count where the
                        map is not: it would describe another map
        mean_lambda     mean_lambda(x) or mean_lambda(): the mean weight of the second branch
        mean_lambda of tokens      it needs x
    """
    found = {name for name in ("attention_map", "branches", "mean_lambda") if hasattr(attn, name)}
    if not issubclass(owner_of(attn, "branches"), owner_of(attn, "attention_map")):
        found.discard("branches")
    if "keep" in inspect.signature(attn.forward).parameters:
        found.add("keep")
    if "mean_lambda" in found and any(parameter.default is parameter.empty for parameter in
                                      inspect.signature(attn.mean_lambda).parameters.values()):
        found.add("mean_lambda of tokens")
    return found


def owner_of(attn, name):
    """The class that a method of an attention is written in."""
    return next((kind for kind in type(attn).__mro__ if name in vars(kind)), object)


def doubled_diff_attention(dim, num_heads, **kwargs):
    """Version 1 with as many heads as self-attention, so q and k are twice as wide: the published claim's setting."""
    return DiffAttention(dim, num_heads, head_dim=dim // num_heads, **kwargs)


# To add an attention of your own, write its class and give it a row here, or do both in a file for train.py --plugin.
MODELS = {
    "vit": dict(attention=SelfAttention),
    "vitbalanced": dict(attention=SelfAttention, dim=48),
    "vitboth": dict(attention=SelfAttention, num_heads=4, mlp_dim=160),  # as many maps and parameters as vitdiff
    "vitdiff": dict(attention=doubled_diff_attention),
    "vitdiffpaper": dict(attention=DiffAttention, num_heads=1),
    "vitdiffv2": dict(attention=DiffAttentionV2),
}


def build_model(name, image_size=28, in_channels=1, num_classes=10, **overrides):
    """The ViT that row `name` of MODELS describes, with any argument of ViT overridden.

    Raises:
        KeyError: if MODELS has no such row.
        SizeError: if the sizes do not fit together.
    """
    sizes = dict(image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    return ViT(**sizes, **(MODELS[name] | overrides))
