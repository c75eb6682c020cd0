"""UNet: a convolutional network for small images, conditioned on t, t - s and augmentation labels.

Parameter names are the official ones, so that official state dicts load with strict=True.
Source: Song et al. 2021 (DDPM++ blocks and FIR resampling); Karras et al. 2022 (augmentation labels);
arXiv 2512.15657 (two time embeddings).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from soflow.config import require
from soflow.kernels import reference
from soflow.models.dropout import Dropout, fresh_draw_keys
from soflow.models.network import Network
from soflow.models.pair import Pair, PairOps
from soflow.models.recompute import Runner, kept, recomputed

LARGEST_PERIOD = 10000.0
MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4
# Keeps the variance of a sum of two branches.
SUM_SCALE = math.sqrt(0.5)
# Xavier gains. The last layer of each branch, and of the network, starts near zero: a block as its skip connection.
LAST_GAIN = 1e-5
QKV_GAIN = math.sqrt(0.2)

Resampling = Literal["keep", "down", "up"]
Mask = Callable[[Tensor], Tensor]  # factors of an activation, of its shape


class Conv(nn.Module):
    """Resampling by a FIR filter, then a zero-padded convolution: (B, C, H, W) to (B, D, H', W')."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        resampling: Resampling = "keep",
        taps: Sequence[float] = (),
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.resampling = resampling
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight, gain)
        if resampling != "keep":
            line = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(line, line) / line.sum().square())[None, None])

    def forward(self, ops: PairOps, x: Pair) -> Pair:
        return ops.conv(self.resample(ops, x), self.weight, self.bias)

    def resample(self, ops: PairOps, x: Pair) -> Pair:
        if self.resampling == "down":
            return ops.downsample(x, self.resample_filter)
        if self.resampling == "up":
            return ops.upsample(x, self.resample_filter)
        return x


class GroupNorm(nn.Module):
    """Group normalisation with affine parameters and at least 4 channels per group: (B, C, H, W) to the same."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_groups = max(1, min(MAX_GROUPS, num_channels // MIN_CHANNELS_PER_GROUP))
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, ops: PairOps, x: Pair) -> Pair:
        return ops.group_norm(x, self.weight, self.bias, self.num_groups)


class Block(nn.Module):
    """Two convolutions around the embedding, then self-attention where asked: (B, C, H, W) to (B, D, H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_size: int,
        attention: bool = False,
        resampling: Resampling = "keep",
        taps: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resampling, taps)
        self.affine = _linear(embedding_size, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=LAST_GAIN)
        changes = in_channels != out_channels or resampling != "keep"
        self.skip = Conv(in_channels, out_channels, 1, resampling, taps) if changes else None
        self.norm2 = GroupNorm(out_channels) if attention else None
        if attention:
            self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=QKV_GAIN)
            self.proj = Conv(out_channels, out_channels, 1, gain=LAST_GAIN)

    def forward(self, ops: PairOps, run: Runner, mask: Mask | None, embedding: Pair, x: Pair, *skips: Pair) -> Pair:
        """Return the block of x, to which `skips` are joined first.

        run: `kept`, or `recomputed` for its norms, SiLU and dropout.  mask: that of its dropout, None for none.
        """
        for skip in skips:
            x = x.join(skip)
        (h,) = run(partial(self._into_branch, ops), x)
        h = h + ops.linear(embedding, self.affine).map(lambda c: c[:, :, None, None])
        (h,) = run(partial(self._out_of_branch, ops, mask), h)
        z = _sum(h, x if self.skip is None else self.skip(ops, x))
        if self.norm2 is None:
            return z
        (qkv,) = run(partial(self._into_attention, ops, self.norm2), z)
        # single-head self-attention of the pixels
        h = ops.product(ops.attention(qkv, num_heads=1), self.proj.weight.flatten(1), self.proj.bias)
        return _sum(h.map(lambda y: y.transpose(1, 2).unflatten(2, z.x.shape[2:])), z)

    def _into_branch(self, ops: PairOps, x: Pair) -> tuple[Pair]:
        return (self.conv0(ops, ops.silu(self.norm0(ops, x))),)

    def _out_of_branch(self, ops: PairOps, mask: Mask | None, h: Pair) -> tuple[Pair]:
        h = ops.silu(self.norm1(ops, h))
        if mask is not None:
            # One mask for both members of the pair: the difference is that of one thinned network.
            h = h.times(mask(h.x))
        return (self.conv1(ops, h),)

    def _into_attention(self, ops: PairOps, norm: GroupNorm, z: Pair) -> tuple[Pair]:
        tokens = norm(ops, z).map(lambda y: y.flatten(2).transpose(1, 2))
        return (ops.product(tokens, _packed(self.qkv.weight.flatten(1)), _packed(self.qkv.bias)),)


class UNet(Network):
    """F(x, t, s), (B, out_channels, R, R) with R = img_resolution, and its finite difference; unconditional.

    x: (B, in_channels, R, R).  t, s: (B,).  augment_labels: (B, augment_dim) or None.
    channel_mult: widths over model_channels, one per resolution R, R / 2, R / 4, ...
    attn_resolutions: where every encoder block and the last decoder block have self-attention, as the first block of
    the decoder always has.
    dropout: rate in training mode. Its masks depend on draw_keys alone; where these are None, they come from
    torch's global generator.
    ops: `soflow.kernels` or `soflow.kernels.reference` (the default).
    Starts as DDPM++: Xavier uniform, biases zero, with LAST_GAIN and QKV_GAIN where these say so.
    Raises ValueError for a shape that does not fit together.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        embedding_type: str,
        channel_mult_noise: int,
        resample_filter: Sequence[float],
        ops: ModuleType | None = None,
    ) -> None:
        super().__init__()
        for name, count in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("model_channels", model_channels),
            ("channel_mult_emb", channel_mult_emb),
            ("num_blocks", num_blocks),
            ("channel_mult_noise", channel_mult_noise),
        ):
            require(name, count, count >= 1, "at least 1")
        time_size = model_channels * channel_mult_noise
        features = f"a factor that makes an even number of at least 4 features of model_channels {model_channels}"
        require("channel_mult_noise", channel_mult_noise, time_size % 2 == 0 and time_size >= 4, features)
        require("augment_dim", augment_dim, augment_dim >= 0, "at least 0")
        require("dropout", dropout, 0 <= dropout < 1, "from 0 to below 1")
        require("embedding_type", embedding_type, embedding_type == "positional", "'positional'")
        taps_valid = len(resample_filter) % 2 == 0 and sum(resample_filter) > 0
        require("resample_filter", resample_filter, taps_valid, "an even number of taps with a sum above 0")
        resolutions = _resolutions(img_resolution, channel_mult, attn_resolutions)

        self.input_size = img_resolution
        self.in_channels = in_channels
        self.num_classes = 0
        self.augment_dim = augment_dim
        self.dropout = dropout
        self.time_size = time_size
        self.ops = PairOps(reference if ops is None else ops)

        embedding_size = model_channels * channel_mult_emb
        self.map_augment = _linear(augment_dim, 2 * time_size, bias=False) if augment_dim else None
        self.map_layer0 = _linear(2 * time_size, embedding_size)
        self.map_layer1 = _linear(embedding_size, embedding_size)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()

        block = partial(Block, embedding_size=embedding_size, taps=resample_filter)
        levels = [
            (_size(r), r in attn_resolutions, model_channels * m)
            for r, m in zip(resolutions, channel_mult, strict=True)
        ]
        width = model_channels
        self.enc[f"{_size(img_resolution)}_conv"] = Conv(in_channels, width, 3)
        skip_widths = [width]
        for level, (size, attends, level_width) in enumerate(levels):
            if level > 0:
                self.enc[f"{size}_down"] = block(width, width, resampling="down")
                skip_widths.append(width)
            for index in range(num_blocks):
                self.enc[f"{size}_block{index}"] = block(width, level_width, attention=attends)
                width = level_width
                skip_widths.append(width)

        self.dec[f"{_size(resolutions[-1])}_in0"] = block(width, width, attention=True)
        self.dec[f"{_size(resolutions[-1])}_in1"] = block(width, width)
        for level, (size, attends, level_width) in reversed(list(enumerate(levels))):
            if level + 1 < len(levels):
                self.dec[f"{size}_up"] = block(width, width, resampling="up")
            for index in range(num_blocks + 1):
                attention = attends and index == num_blocks
                self.dec[f"{size}_block{index}"] = block(width + skip_widths.pop(), level_width, attention=attention)
                width = level_width
        self.dec[f"{_size(img_resolution)}_aux_norm"] = GroupNorm(width)
        self.dec[f"{_size(img_resolution)}_aux_conv"] = Conv(width, out_channels, 3, gain=LAST_GAIN)
        for norm in self.modules():
            if isinstance(norm, GroupNorm):
                channels, groups = len(norm.weight), norm.num_groups
                divisible = f"one that makes the {channels} channels of a block a multiple of {groups} groups"
                require("model_channels", model_channels, channels % groups == 0, divisible)

    def bf16_modules(self) -> Iterable[nn.Module]:
        """Return the blocks of both halves; embeddings, the first and the last convolution stay in float32."""
        return [module for module in (*self.enc.values(), *self.dec.values()) if isinstance(module, Block)]

    def augmentation_parameters(self) -> Iterable[nn.Parameter]:
        """Return the weights of `map_augment`, if there are any."""
        return () if self.map_augment is None else self.map_augment.parameters()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> Tensor:
        """Return F(x, t, s), (B, out_channels, R, R); augment_labels None is no augmentation, labels must be None."""
        self._check_inputs(x, labels, augment_labels)
        return self._run(Pair(x), Pair(t), Pair(t - s), augment_labels, draw_keys).x

    def forward_flops(self) -> int:
        """Return the operations of `forward` on one row: products and convolutions, a product-sum being two."""
        products = sum(layer.weight.numel() for layer in self.children() if isinstance(layer, nn.Linear))
        if self.map_augment is not None:
            # only where there are augmentation labels, which samples have not
            products -= self.map_augment.weight.numel()
        for name, part in (*self.enc.items(), *self.dec.items()):
            pixels = int(name.partition("x")[0]) ** 2
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    products += layer.weight.numel()
                elif isinstance(layer, Conv):
                    products += pixels * layer.weight.numel()
                    if layer.resampling != "keep":
                        # per channel; the filter spreads from, or gathers at, the pixels of the lower resolution
                        low = pixels if layer.resampling == "down" else pixels // 4
                        products += low * layer.weight.shape[1] * layer.resample_filter.numel()
            if isinstance(part, Block) and part.norm2 is not None:
                products += 2 * pixels**2 * part.out_channels
        return 2 * products

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

        dx: (M, in_channels, R, R), dt: (M,), M <= B.  F_t carries the gradient; dF, (M, out_channels, R, R), is exact
        relative to its own size and carries none. With dropout both are of the same thinned network.
        """
        self._check_inputs(x, labels, augment_labels)
        if len(dx) == 0:
            F_t = self._run(Pair(x), Pair(t), Pair(t - s), augment_labels, draw_keys).x
            return F_t, F_t.detach()[:0]
        out = self._run(Pair(x, dx), Pair(t, dt), Pair(t - s, dt), augment_labels, draw_keys)
        assert out.d is not None
        return out.x, out.d

    def _run(self, x: Pair, t: Pair, t_minus_s: Pair, augment_labels: Tensor | None, draw_keys: Tensor | None) -> Pair:
        ops = self.ops
        dropout = None
        if self.training and self.dropout > 0:
            keys = fresh_draw_keys(len(x.x), x.x.device) if draw_keys is None else draw_keys
            dropout = Dropout(ops.ops, self.dropout, keys)
        embedding = self._embed(t, t_minus_s, augment_labels)
        first, *encoder = self.enc.values()
        *decoder, norm, last = self.dec.values()

        x = first(ops, x)
        skips = [x]
        for layer, block in enumerate(encoder):
            x = self._run_block(block, dropout, layer, embedding, x)
            skips.append(x)
        for layer, block in enumerate(decoder, start=len(encoder)):
            joined = [skips.pop()] if block.in_channels != x.x.shape[1] else []
            x = self._run_block(block, dropout, layer, embedding, x, *joined)
        run = kept if self.recompute == "none" else recomputed
        (out,) = run(lambda x: (last(ops, ops.silu(norm(ops, x))),), x)
        return out

    def _run_block(self, block: nn.Module, dropout: Dropout | None, layer: int, *inputs: Pair) -> Pair:
        mask = None if dropout is None else partial(dropout.mask, layer)
        if self.recompute == "blocks":
            (z,) = recomputed(lambda *pairs: (block(self.ops, kept, mask, *pairs),), *inputs)
        else:
            z = block(self.ops, recomputed if self.recompute == "norms" else kept, mask, *inputs)
        return z

    def _embed(self, t: Pair, t_minus_s: Pair, augment_labels: Tensor | None) -> Pair:
        ops = self.ops
        h = self._time_features(t).join(self._time_features(t_minus_s))
        if augment_labels is not None and self.map_augment is not None:
            h = h.plus(ops.linear(Pair(augment_labels), self.map_augment).x)
        h = ops.silu(ops.linear(h, self.map_layer0))
        return ops.silu(ops.linear(h, self.map_layer1))

    def _time_features(self, t: Pair) -> Pair:
        """Sines, then cosines, of t w_i, with w_i from 1 to 1 / LARGEST_PERIOD, both included."""
        half = self.time_size // 2
        cosines, sines = self.ops.time_features(t, self.time_size, LARGEST_PERIOD ** (half / (half - 1))).chunk(2)
        return sines.join(cosines)

    def _check_inputs(self, x: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> None:
        shape = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != shape:
            raise ValueError(f"x: got a tensor of {tuple(x.shape)}, expected (B, {shape[0]}, {shape[1]}, {shape[2]})")
        if labels is not None:
            raise ValueError(f"labels: got a tensor of {tuple(labels.shape)}, expected None: UNet is unconditional")
        if augment_labels is not None and augment_labels.shape[1:] != (self.augment_dim,):
            expected = f"(B, {self.augment_dim})" if self.augment_dim else "None, because augment_dim is 0"
            raise ValueError(f"augment_labels: got a tensor of {tuple(augment_labels.shape)}, expected {expected}")


def _linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _sum(branch: Pair, skip: Pair) -> Pair:
    return (branch + skip).map(lambda y: y * SUM_SCALE)


def _packed(rows: Tensor) -> Tensor:
    """Rows in the order (channel, q k v), as the state dict has them, in the order (q k v, channel) of the ops."""
    return rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)


def _size(resolution: int) -> str:
    return f"{resolution}x{resolution}"


def _resolutions(img_resolution: int, channel_mult: Sequence[int], attn_resolutions: Sequence[int]) -> list[int]:
    factors_valid = len(channel_mult) > 0 and all(factor >= 1 for factor in channel_mult)
    require("channel_mult", channel_mult, factors_valid, "at least one factor, each at least 1")
    divisor = 2 ** (len(channel_mult) - 1)
    require("img_resolution", img_resolution, img_resolution >= 1, "at least 1")
    fewer = f"fewer factors, because {img_resolution} pixels are no multiple of {divisor}"
    require("channel_mult", channel_mult, img_resolution % divisor == 0, fewer)
    resolutions = [img_resolution >> level for level in range(len(channel_mult))]
    require("attn_resolutions", attn_resolutions, set(attn_resolutions) <= set(resolutions), f"some of {resolutions}")
    return resolutions
