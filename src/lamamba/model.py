"""LaMamba-Diff (Fu, Chen, Yu 2024, arXiv 2408.02615): the whole network, top to bottom.

A U-Net over a grid of pixels or latents. Each block mixes the image globally with a state-space scan along four paths,
locally with window attention, and per pixel with an MLP. All three are modulated by the timestep and the label.
Activations are channels-last, (b, h, w, c), from the patch embedding to the output.

Initialization (`LaMambaDiff.reset_parameters`):

    linear layers, patch embedding      Xavier uniform, bias 0
    label table, timestep layers        normal(0, 0.02), bias 0
    block and head modulation           0
    position_embedding                  2-D sine-cosine
    relative_position_bias              normal(0, 0.02), truncated
    SS2D A_log, D                       log(1..n), 1
    SS2D dt_weight, dt_bias             uniform +-rank^-0.5; inverse softplus of a log-uniform step in [1e-3, 1e-1]
    SS2D x_proj_weight, convolutions    PyTorch's default for the same shape
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from lamamba.config import NetworkConfig, preset
from lamamba.files import utf8_path
from lamamba.files.records import read_record
from lamamba.files.weights import CONFIG, check_loaded
from lamamba.ops.depthwise_convolution import depthwise_convolution
from lamamba.ops.fused_layers import Norm, gated_norm_linear, norm_attention, norm_linear_in_halves, norm_mlp
from lamamba.ops.grid import NUM_PATHS
from lamamba.ops.linear import Linear, compute_dtype
from lamamba.ops.modulation import Modulations, modulate, modulate_together
from lamamba.ops.residual_norm import Residual, add_gated, layer_norm
from lamamba.ops.selective_scan import project_and_scan


class LaMambaDiff(ModelMixin, ConfigMixin):
    """The denoising network. It maps a noisy image, its timestep and its label to two channels per input channel.

    The arguments are those of `lamamba.config.NetworkConfig`; the defaults are the authors' XL at 256 px.

    Raises:
        ConfigError: an argument is invalid; the message says what to do.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # operations read the weights of several modules at once
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = NetworkConfig.in_channels,
        sample_size: int = NetworkConfig.sample_size,
        num_classes: int = NetworkConfig.num_classes,
        embed_dim: int = NetworkConfig.embed_dim,
        depths: Sequence[int] = NetworkConfig.depths,
        bottleneck_depth: int = NetworkConfig.bottleneck_depth,
        decoder_extra_depth: int = NetworkConfig.decoder_extra_depth,
        num_heads: int = NetworkConfig.num_heads,
        window_size: int = NetworkConfig.window_size,
        ssm_ratio: float = NetworkConfig.ssm_ratio,
        ssm_state_size: int = NetworkConfig.ssm_state_size,
        ssm_dt_rank: int | None = NetworkConfig.ssm_dt_rank,
        ssm_conv_bias: bool = NetworkConfig.ssm_conv_bias,
        scan: str = NetworkConfig.scan,
        mlp_ratio: float = NetworkConfig.mlp_ratio,
        downsample: str = NetworkConfig.downsample,
        label_dropout: float = NetworkConfig.label_dropout,
        use_ssm: bool = NetworkConfig.use_ssm,
        use_attention: bool = NetworkConfig.use_attention,
    ) -> None:
        super().__init__()
        config = NetworkConfig(**{name: self.config[name] for name in NetworkConfig.__dataclass_fields__})
        widths = [embed_dim, 2 * embed_dim, 4 * embed_dim, 4 * embed_dim]
        self.gradient_checkpointing = False

        self.patch_projection = Linear(in_channels, embed_dim)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.position_embedding = nn.Parameter(torch.empty(1, sample_size, sample_size, embed_dim))
        self.timestep_embedding = TimestepEmbedding(4 * embed_dim)
        self.label_embedding = nn.Embedding(num_classes + 1, 4 * embed_dim)

        def stage(width: int, depth: int, project: bool) -> nn.ModuleList:
            shifted = [index % 2 == 1 for index in range(depth)]
            return nn.ModuleList(Block(config, width, shift, project) for shift in shifted)

        self.encoder = nn.ModuleList(
            stage(width, depth, project=width != widths[-1]) for width, depth in zip(widths, depths, strict=True)
        )
        downsampling = {"merge": MergeDownsample, "conv": ConvDownsample}[downsample]
        self.downsamples = nn.ModuleList(downsampling(width) for width in widths[:2])
        self.bottleneck = stage(widths[-1], bottleneck_depth, project=False)
        self.decoder = nn.ModuleList(
            stage(width, depth + decoder_extra_depth, project=True)
            for width, depth in zip(widths[::-1], depths[::-1], strict=True)
        )
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[2:0:-1])
        self.head = Head(embed_dim, 4 * embed_dim, 2 * in_channels)
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Build a network with new parameters from a preset in `lamamba.config.PRESETS`, with some options replaced.

        Raises:
            ConfigError: there is no such preset (the message suggests the nearest), or an option is invalid.
        """
        return cls(**{**vars(preset(name)), **overrides})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Self:
        """Load a network that `save_pretrained` wrote, with diffusers' options.

        With `torch_dtype=torch.bfloat16`, the parameters of the scan's state (`A_log`, `D` and `dt_bias`) stay float32,
        like the state itself. `.to(torch.bfloat16)` rounds them too, as in any module.

        Raises:
            CheckpointError: a value of config.json is wrong, or weights are missing, unexpected or not finite.
        """
        # diffusers' default, and its way to keep parameters in float32, need accelerate and warn without it. The
        # network fits into memory twice.
        options.setdefault("low_cpu_mem_usage", False)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        wants_info = options.pop("output_loading_info", False)
        place = pretrained_model_name_or_path  # a name on the hub, or a folder
        if Path(place).is_dir():
            read_record(Path(place) / (options.get("subfolder") or "") / CONFIG, NetworkConfig)
            place = utf8_path(Path(place))
        network, info = super().from_pretrained(place, output_loading_info=True, **options)
        check_loaded(pretrained_model_name_or_path, network, info)
        if isinstance(dtype, torch.dtype):
            convert_parameters(network, dtype)
        return (network, info) if wants_info else network  # type: ignore[return-value]

    @property
    def null_label(self) -> int:
        """The label that means "no label": the last row of the label table."""
        return int(self.config.num_classes)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict noise and variance, or the velocity, from a noisy image.

        Args:
            x_t: (b, c, h, w) noisy images or latents. h and w are even and at least 4; they may differ from
                `sample_size`.
            t: (b,) timesteps, integer or float, from 0 to 1000.
            y: (b,) labels from 0 to num_classes, where num_classes means "no label"; not needed by an unconditional
                network. The network drops no labels; the objective does that in training. Alternatively
                (b, num_classes + 1) floating point weights, for a weighted sum of the label embeddings.

        Returns:
            (b, 2c, h, w) in the dtype of x_t. For noise prediction: the noise, then the log-variance as a position from
            -1 to 1 between its bounds (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15).

        Raises:
            ValueError: a shape, a size or (on a CPU) a label is out of range.
        """
        y = self._check_inputs(x_t, t, y)
        dtype = self.patch_projection.weight.dtype
        x = normalize(self.patch_projection(rearrange(x_t, "b c h w -> b h w c").to(dtype)), self.patch_norm)
        x = x + self.resize_position_embedding(*x_t.shape[2:]).to(x.dtype)
        condition = self.timestep_embedding(t) + self._embed(y)
        is_checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        found = {} if is_checkpointed else modulate_together(condition, self)

        skips = []
        for index, blocks in enumerate(self.encoder):
            x = self._run(blocks, x, condition, found)
            skips.append(x)
            if index < len(self.downsamples):
                x = self.downsamples[index](x)
        x = x + self._run(self.bottleneck, x, condition, found)
        for index, blocks in enumerate(self.decoder):
            skip = skips.pop()
            if index >= 2:
                x = self.upsamples[index - 2](x)[:, : skip.shape[1], : skip.shape[2]]
            x = self._run(blocks, x + skip, condition, found)
        out = self.head(x, condition, found.get(self.head))
        return out.permute(0, 3, 1, 2).to(x_t.dtype).contiguous()

    def _run(self, blocks: nn.Module, x: Tensor, condition: Tensor, found: Modulations) -> Tensor:
        residual: Residual | None = None
        for block in cast(nn.ModuleList, blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, residual = self._gradient_checkpointing_func(block, x, condition, residual)
            else:
                x, residual = block(x, condition, residual, found.get(block))
        return x if residual is None else add_gated(x, residual)

    def _embed(self, y: Tensor) -> Tensor:
        table = self.label_embedding.weight
        return y.to(table.dtype) @ table if y.is_floating_point() else self.label_embedding(y)

    def resize_position_embedding(self, height: int, width: int) -> Tensor:
        """Return the position embedding of a grid, (1, height, width, embed_dim), resized if necessary."""
        embedding = self.position_embedding
        if embedding.shape[1:3] == (height, width):
            return embedding
        resized = F.interpolate(
            rearrange(embedding.float(), "b h w c -> b c h w"), (height, width), mode="bicubic", align_corners=False
        )
        return rearrange(resized, "b c h w -> b h w c").to(embedding.dtype)

    def _check_inputs(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        channels, num_classes = self.config.in_channels, self.config.num_classes
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise ValueError(f"x_t is {tuple(x_t.shape)}: give (b, {channels}, h, w)")
        batch, _, height, width = x_t.shape
        if height % 2 or width % 2 or min(height, width) < 4:
            raise ValueError(f"x_t is {height} by {width} pixels: both must be even and at least 4")
        if t.shape != (batch,):
            raise ValueError(f"t is {tuple(t.shape)}: give ({batch},), one timestep for each image of x_t")
        if y is None:
            if num_classes:
                raise ValueError(f"y is missing: give ({batch},) labels from 0 to {num_classes} ({num_classes}: none)")
            return torch.zeros(batch, dtype=torch.long, device=x_t.device)
        if y.is_floating_point():
            if y.shape != (batch, num_classes + 1):
                raise ValueError(f"y is {tuple(y.shape)}: give ({batch}, {num_classes + 1}), weights of all labels")
            return y
        if y.shape != (batch,):
            raise ValueError(f"y is {tuple(y.shape)}: give ({batch},), one label for each image of x_t")
        # Checking labels on a GPU would wait for it; there, the embedding's own assertion has to suffice.
        on_cpu = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and batch and not 0 <= int(y.min()) <= int(y.max()) <= num_classes:
            raise ValueError(f"y goes from {int(y.min())} to {int(y.max())}: labels go from 0 to {num_classes}")
        return y

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all parameters as in the table at the top of this file."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if module is not self and hasattr(module, "reset_own_parameters"):
                module.reset_own_parameters()
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        _, size, _, channels = self.position_embedding.shape
        self.position_embedding.copy_(_sine_cosine_positions(size, channels))


NETWORKS: dict[str, Callable[..., Any]] = {"LaMambaDiff": LaMambaDiff}
"""All networks that can be trained, by class name. Code may add its own: `examples/network.py`."""


class TimestepEmbedding(nn.Module):
    """Embed timesteps (b,) as (b, width): 256 sinusoids, then two linear layers."""

    num_sinusoids = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(self.num_sinusoids, width)
        self.linear_2 = Linear(width, width)

    def reset_own_parameters(self) -> None:
        nn.init.normal_(self.linear_1.weight, std=0.02)
        nn.init.normal_(self.linear_2.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_sinusoids // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angles = t.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class Block(nn.Module):
    """Scan, window attention and MLP, each a residual branch with shift, scale and gate from the condition.

    A branch takes the stream and its norm, and returns the stream with the branch before added, and its own output:
    without the bias of its last layer, which is returned separately; see `Residual`.

    Args:
        config: options of the network.
        width: number of channels c of this block.
        shifted: whether attention windows are shifted by half a window.
        project: whether a linear layer first maps the condition (b, 4 embed_dim) to (b, c).
    """

    def __init__(self, config: NetworkConfig, width: int, shifted: bool, project: bool) -> None:
        super().__init__()
        self.condition_projection = Linear(4 * config.embed_dim, width) if project else nn.Identity()
        self.ssm = SS2D(config, width) if config.use_ssm else None
        self.attention = WindowAttention(config, width, shifted) if config.use_attention else None
        self.mlp = Mlp(width, int(config.mlp_ratio * width))
        self.ssm_norm = nn.LayerNorm(width) if config.use_ssm else None
        self.attention_norm = nn.LayerNorm(width) if config.use_attention else None
        self.mlp_norm = nn.LayerNorm(width)
        self.modulation = Linear(width, 3 * width * len(self._branches()))

    def _branches(self) -> list[tuple[nn.Module, nn.LayerNorm]]:
        pairs = ((self.ssm, self.ssm_norm), (self.attention, self.attention_norm), (self.mlp, self.mlp_norm))
        return [(branch, norm) for branch, norm in pairs if branch is not None and norm is not None]

    def reset_own_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Compute shift, scale and gate of each branch, (b, c) each, from the condition, (b, 4 embed_dim)."""
        return modulate(self, condition)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        residual: Residual | None = None,
        modulation: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Residual]:
        """Run the block on x and the previous block's residual, not added yet; return both for the next block.

        Each branch's output is added together with the next normalization, so x is read only once for both.
        `modulation` has the shifts, scales and gates of all branches if the network has already computed them.
        """
        parts = iter(self.modulate(condition) if modulation is None else modulation)
        for branch, norm in self._branches():
            shift_scale, gate = (next(parts), next(parts)), next(parts)
            x, out, bias = branch(Norm(x, residual, norm.weight, norm.bias, shift_scale, norm.eps))
            residual = Residual(out, gate, bias)
        assert residual is not None  # every block has an MLP
        return x, residual


def convert_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters to a dtype. If it has 16 bits, A_log, D and dt_bias become float32, like the scan's state."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in network.named_parameters():
        is_of_state = name.endswith((".A_log", ".D", ".dt_bias"))
        parameter.data = parameter.data.to(state_dtype if is_of_state else dtype)


def normalize(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply `norm` to (b, h, w, c), in the dtype to compute in."""
    return layer_norm(x, norm.weight, norm.bias, None, norm.eps, compute_dtype(x))


class SS2D(nn.Module):
    """The sum of four selective scans over the grid: every pixel sees every other pixel, at linear cost."""

    rounded_parameters = ("x_proj_weight", "dt_weight")

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        inner = int(config.ssm_ratio * width)
        self.scan = config.scan
        self.dt_rank = config.ssm_dt_rank or math.ceil(width / 16)
        self.state_size = config.ssm_state_size
        low = self.dt_rank + 2 * self.state_size
        self.in_proj = Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=config.ssm_conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(NUM_PATHS, low, inner))
        self.dt_weight = nn.Parameter(torch.empty(NUM_PATHS, inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(NUM_PATHS, inner))
        self.A_log = nn.Parameter(torch.empty(NUM_PATHS, inner, self.state_size))
        self.D = nn.Parameter(torch.empty(NUM_PATHS, inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Linear(inner, width, bias=False)

    def reset_own_parameters(self) -> None:
        bound = self.x_proj_weight.shape[2] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, norm: Norm) -> tuple[Tensor, Tensor, None]:
        """Mix (b, h, w, c) globally; return the stream, the result, and None, because there is no bias."""
        x, u, z = norm_linear_in_halves(norm, self.in_proj.weight)
        u = depthwise_convolution(u, self.convolution.weight, self.convolution.bias)
        planes = project_and_scan(u, self.x_proj_weight, self.dt_weight, self.dt_bias, self.A_log, self.D, self.scan)
        own = self.out_norm
        return x, gated_norm_linear(planes, z, own.weight, own.bias, own.eps, self.out_proj.weight), None


class WindowAttention(nn.Module):
    """Attention inside windows (see `lamamba.ops.window_attention`), between two linear layers."""

    def __init__(self, config: NetworkConfig, width: int, shifted: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.window_size = config.window_size
        self.shifted = shifted
        self.qkv = Linear(width, 3 * width)
        self.relative_position_bias = nn.Parameter(torch.empty((2 * self.window_size - 1) ** 2, self.num_heads))
        self.out_proj = Linear(width, width)

    def reset_own_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias, std=0.02)

    def forward(self, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """Mix (b, h, w, c) locally; return the stream, the result without its bias, and the bias."""
        weights = (self.qkv.weight, self.qkv.bias, self.relative_position_bias, self.out_proj.weight)
        x, out = norm_attention(norm, *weights, self.num_heads, self.window_size, self.shifted)
        return x, out, self.out_proj.bias


class Mlp(nn.Module):
    """Two linear layers with an exact GELU and, in training, dropout between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, hidden)
        self.dropout = nn.Dropout(0.0)  # training sets its probability, see `lamamba.training.trainer.Trainer`
        self.linear_2 = Linear(hidden, width)

    def forward(self, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """Map the channels of every pixel; return the stream, the result without its bias, and the bias."""
        weights = (self.linear_1.weight, self.linear_1.bias, self.linear_2.weight)
        x, out = norm_mlp(norm, *weights, self.dropout.p if self.training else 0.0)
        return x, out, self.linear_2.bias


def _pad_to_even(x: Tensor) -> Tensor:
    """Pad an odd grid with a row or column of zeros, which the decoder crops again."""
    return F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))


class MergeDownsample(nn.Module):
    """Halve a grid and double its channels: concatenate 2x2 neighbors, normalize, linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(_pad_to_even(x), "b (h row) (w column) c -> b h w (column row c)", row=2, column=2)
        return self.reduction(normalize(x, self.norm))


class ConvDownsample(nn.Module):
    """Halve a grid and double its channels: 2x2 convolution with stride 2, then norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(rearrange(_pad_to_even(x), "b h w c -> b c h w"))
        return normalize(rearrange(x, "b c h w -> b h w c"), self.norm)


class Upsample(nn.Module):
    """Double a grid and halve its channels: linear layer, unfold, norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expansion = Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.expansion(x), "b h w (row column c) -> b (h row) (w column) c", row=2, column=2)
        return normalize(x, self.norm)


class Head(nn.Module):
    """Map the last stage to the output channels, modulated by the condition."""

    def __init__(self, width: int, condition_width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.condition_projection = Linear(condition_width, width)
        self.modulation = Linear(width, 2 * width)
        self.output = Linear(width, out_channels)

    def reset_own_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor, modulation: Sequence[Tensor] | None = None) -> Tensor:
        shift, scale = modulate(self, condition) if modulation is None else modulation
        x = normalize(self.linear(x), self.norm)
        return self.output(layer_norm(x, modulation=(shift, scale), eps=1e-6))


def _sine_cosine_positions(size: int, channels: int) -> Tensor:
    """Return (size, size, channels), where the first half of the channels encodes the column and the second the row."""
    quarter = channels // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = axis[None, :].expand(size, -1, -1), axis[:, None].expand(-1, size, -1)
    return torch.cat([column, row], dim=-1).float()
