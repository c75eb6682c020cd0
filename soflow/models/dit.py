"""DiT: a transformer on image patches, conditioned on t, t - s and the class by adaptive layer norm.

Parameter names are the official ones, so that official state dicts load with strict=True.
Source: Peebles and Xie 2023 (adaLN-zero blocks); arXiv 2512.15657 (two time embeddings).
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from soflow.config import require
from soflow.kernels import reference
from soflow.models.network import Network
from soflow.models.pair import Pair, PairOps
from soflow.models.recompute import Runner, kept, recomputed

NUM_TIME_FEATURES = 256
EMBEDDING_STD = 0.02


class PatchEmbed(nn.Module):
    """Patches of an image, projected to the width of the network: (B, C, H, W) to (B, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.patch_size = patch_size

    def forward(self, ops: PairOps, x: Pair) -> Pair:
        patches = Pair(self._patches(x.x), None if x.d is None else self._patches(x.d))
        return ops.product(patches, self.proj.weight.flatten(1), self.proj.bias)

    def _patches(self, x: Tensor) -> Tensor:
        p = self.patch_size
        rows = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, C, rows, p, columns, p)
        return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class TimeEmbedder(nn.Module):
    """Time features through a two-layer SiLU network: (B,) to (B, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp: Any = nn.ModuleList(
            (nn.Linear(NUM_TIME_FEATURES, hidden_size), nn.Identity(), nn.Linear(hidden_size, hidden_size))
        )

    def forward(self, ops: PairOps, t: Pair) -> Pair:
        h = ops.linear(ops.time_features(t, NUM_TIME_FEATURES), self.mlp[0])
        return ops.linear(ops.silu(h), self.mlp[2])


class LabelEmbedder(nn.Module):
    """One vector per class, and one more, index num_classes, for the null label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Modulation(nn.Module):
    """SiLU, then a linear layer whose output is chunked into shifts, scales and gates; starts at zero."""

    def __init__(self, hidden_size: int, num_chunks: int) -> None:
        super().__init__()
        self.add_module("1", nn.Linear(hidden_size, num_chunks * hidden_size))
        self.num_chunks = num_chunks

    @property
    def layer(self) -> nn.Linear:
        """The linear layer, which the official names call adaLN_modulation.1."""
        layer = self.get_submodule("1")
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, ops: PairOps, c: Pair) -> list[Pair]:
        """Map the activated conditioning silu(c), (B, D), to num_chunks pairs of (B, D)."""
        return ops.linear(c, self.layer).chunk(self.num_chunks)


class Attention(nn.Module):
    """The parameters of multi-head self-attention with packed qkv."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class Mlp(nn.Module):
    """The parameters of two linear layers with GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)


class Block(nn.Module):
    """Attention and MLP, each between a modulated norm and a gate: the residual stream z, (B, T, D), to the same.

    The last gate is left to what follows, which fuses it with its norm: a block takes and returns z with the branch
    that it still lacks, as the triple z, y and gate of z + gate y. The first block takes z alone.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = Modulation(hidden_size, num_chunks=6)

    def forward(self, ops: PairOps, run: Runner, modulation: Sequence[Pair], *stream: Pair) -> tuple[Pair, Pair]:
        """Return z and the branch of the MLP.  run: `kept`, or `recomputed` for its norms and GELU."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp = modulation
        z, qkv = run(partial(self._into_attention, ops), shift_attn, scale_attn, *stream)
        y = ops.linear(ops.attention(qkv, self.attn.num_heads), self.attn.proj)
        z, u = run(partial(self._into_mlp, ops), shift_mlp, scale_mlp, z, y, gate_attn)
        (y,) = run(partial(self._out_of_mlp, ops), u)
        return z, y

    def _into_attention(self, ops: PairOps, shift: Pair, scale: Pair, *stream: Pair) -> tuple[Pair, Pair]:
        z, h = _add_and_norm(ops, shift, scale, *stream, dtype=self.dtype)
        return z, ops.linear(h, self.attn.qkv)

    def _into_mlp(self, ops: PairOps, shift: Pair, scale: Pair, *stream: Pair) -> tuple[Pair, Pair]:
        z, h = _add_and_norm(ops, shift, scale, *stream, dtype=self.dtype)
        return z, ops.product(h, self.mlp.fc1.weight)

    def _out_of_mlp(self, ops: PairOps, u: Pair) -> tuple[Pair]:
        return (ops.linear(ops.gelu(u, self.mlp.fc1.bias), self.mlp.fc2),)

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights, and so of the activations inside its branches."""
        return self.mlp.fc1.weight.dtype


class FinalLayer(nn.Module):
    """The last modulation, and the projection of each token to its patch."""

    def __init__(self, hidden_size: int, patch_elements: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_elements)
        self.adaLN_modulation = Modulation(hidden_size, num_chunks=2)

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights, and so of what it computes."""
        return self.linear.weight.dtype


class DiT(Network):
    """F(x, t, s, labels), (B, C, H, W), and its finite difference.

    x: (B, in_channels, input_size, input_size).  t, s: (B,).  labels: (B,) int64, num_classes being the null label.
    ops: `soflow.kernels` or `soflow.kernels.reference` (the default).
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        ops: ModuleType | None = None,
    ) -> None:
        super().__init__()
        _check_shape(input_size, patch_size, hidden_size, depth, num_heads, mlp_ratio)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.ops = PairOps(reference if ops is None else ops)

        grid_size = input_size // patch_size
        self.pos_embed = nn.Parameter(_position_features(hidden_size, grid_size)[None], requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.s_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks: Any = nn.ModuleList(
            Block(hidden_size, num_heads, int(hidden_size * mlp_ratio)) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self._initialize()

    def bf16_modules(self) -> Iterable[nn.Module]:
        """Return the blocks; embeddings, residual stream and the last projection stay in float32."""
        return self.blocks

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> Tensor:
        """Return F(x, t, s, labels), (B, C, H, W); labels None is the null label for every row."""
        _refuse_augment_labels(augment_labels)
        return self._run(Pair(x), Pair(t), Pair(t - s), labels).x

    def forward_difference(
        self,
        x: Tensor,
        dx: Tensor,
        t: Tensor,
        dt: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return F_t = F(x, t, s) of all rows, and dF = F(x + dx, t + dt, s) - F(x, t, s) of the last len(dx) rows.

        dx: (M, C, H, W), dt: (M,), M <= B.  F_t carries the gradient; dF, (M, C, H, W), is exact relative to its own
        size and carries none.
        """
        _refuse_augment_labels(augment_labels)
        if len(dx) == 0:
            return self._run(Pair(x), Pair(t), Pair(t - s), labels).x, dx
        out = self._run(Pair(x, dx), Pair(t, dt), Pair(t - s, dt), labels)
        assert out.d is not None
        return out.x, out.d

    def forward_flops(self) -> int:
        """Return the operations of `forward` on one row: its matrix products, a product-sum being two."""
        tokens, hidden = self.pos_embed.shape[1:]
        mlp = self.blocks[0].mlp.fc1.out_features
        patch = self.patch_size**2 * self.in_channels
        time_embedder = NUM_TIME_FEATURES * hidden + hidden**2
        block = tokens * (4 * hidden**2 + 2 * hidden * mlp + 2 * tokens * hidden) + 6 * hidden**2
        final = tokens * hidden * patch + 2 * hidden**2
        return 2 * (tokens * patch * hidden + 2 * time_embedder + len(self.blocks) * block + final)

    def _run(self, x: Pair, t: Pair, t_minus_s: Pair, labels: Tensor | None) -> Pair:
        ops = self.ops
        if labels is None:
            labels = torch.full((len(x.x),), self.num_classes, device=x.x.device)
        c = self.t_embedder(ops, t) + self.s_embedder(ops, t_minus_s)
        c = ops.silu(c.plus(self.y_embedder(labels)))

        z = self.x_embedder(ops, x).plus(self.pos_embed)
        modulations = [block.adaLN_modulation(ops, c) for block in self.blocks]
        modulations.append(self.final_layer.adaLN_modulation(ops, c))
        stream: tuple[Pair, ...] = (z,)
        for block, modulation in zip(self.blocks, modulations, strict=False):
            *modulation, gate = modulation
            stream = (*self._run_block(block, modulation, *stream), gate)
        shift, scale = modulations[-1]
        _, h = _add_and_norm(ops, shift, scale, *stream, dtype=self.final_layer.dtype)
        out = ops.linear(h, self.final_layer.linear)
        return Pair(self._unpatchify(out.x), None if out.d is None else self._unpatchify(out.d))

    def _run_block(self, block: Block, modulation: Sequence[Pair], *stream: Pair) -> Sequence[Pair]:
        if self.recompute == "blocks":
            num = len(modulation)
            return recomputed(lambda *pairs: block(self.ops, kept, pairs[:num], *pairs[num:]), *modulation, *stream)
        return block(self.ops, recomputed if self.recompute == "norms" else kept, modulation, *stream)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        grid, p = self.input_size // self.patch_size, self.patch_size
        patches = tokens.unflatten(2, (p, p, self.in_channels)).unflatten(1, (grid, grid))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.input_size, self.input_size)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        assert patch.bias is not None
        nn.init.xavier_uniform_(patch.weight.flatten(1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=EMBEDDING_STD)
        # s_embedder keeps Xavier, as the official code does.
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=EMBEDDING_STD)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=EMBEDDING_STD)
        for modulation in (*(block.adaLN_modulation for block in self.blocks), self.final_layer.adaLN_modulation):
            nn.init.zeros_(modulation.layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def _add_and_norm(
    ops: PairOps, shift: Pair, scale: Pair, z: Pair, *branch: Pair, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """The residual stream z, with the branch (y, gate) added to it if there is one, and its modulated norm."""
    if not branch:
        return z, ops.modulated_norm(z, shift, scale, dtype=dtype)
    y, gate = branch
    return ops.gate_residual_norm(z, y, gate, shift, scale, dtype=dtype)


def _refuse_augment_labels(augment_labels: Tensor | None) -> None:
    if augment_labels is not None:
        raise ValueError(f"augment_labels: got a tensor of {tuple(augment_labels.shape)}, expected None for DiT")


def _check_shape(
    input_size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, mlp_ratio: float
) -> None:
    divides = patch_size >= 1 and input_size % patch_size == 0
    require("patch_size", patch_size, divides, f"a divisor of input_size {input_size}")
    require("hidden_size", hidden_size, hidden_size >= 4 and hidden_size % 4 == 0, "a multiple of 4")
    divides = num_heads >= 1 and hidden_size % num_heads == 0
    require("num_heads", num_heads, divides, f"a divisor of hidden_size {hidden_size}")
    require("depth", depth, depth >= 1, "at least 1")
    require("mlp_ratio", mlp_ratio, int(hidden_size * mlp_ratio) >= 1, "at least 1 / hidden_size")


def _position_features(hidden_size: int, grid_size: int) -> Tensor:
    """Sine-cosine features of each patch, (T, D): the first half of the channels for its column, then for its row."""
    num_frequencies = hidden_size // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = line[None, :, :].expand(grid_size, -1, -1)
    rows = line[:, None, :].expand(-1, grid_size, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()
