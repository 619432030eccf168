"""Writes the network as a graph of ONNX operators, for `lamamba export`.

PyTorch's own exporter takes minutes for a small network, and its graph has several times as many nodes. This module
mirrors `lamamba.model` and the `reference.py` of each operation; tests compare both for every option of the network.
Only the batch is dynamic. Height and width are constants, so that paths and windows are constants, too.

    path, window     one gather of rows of pixels
    scan, one state  blocks, as in src/lamamba/ops/selective_scan/README.md: few operators, each on many values
    scan, several    the operator Scan walks along the paths, a few steps at a time, so that what it computes, (b, 4, n,
                     e) values for each step, stays in cache
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lamamba.model import SS2D, Block, ConvDownsample, LaMambaDiff, MergeDownsample, Mlp, Upsample, WindowAttention
from lamamba.ops.grid import NUM_PATHS, scan_paths
from lamamba.ops.window_attention.geometry import window_geometry

OPSET, IR_VERSION = 20, 9
CHUNK = 16  # steps of a block of the scan with one state
STEPS = 4  # with several states, steps at a time
MAX_OUTPUTS = 7  # of a node
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class Graph:
    """Collects nodes. Every method that adds one returns the name of its output."""

    def __init__(self, stored: str, computed: str) -> None:
        self.stored, self.computed = stored, computed
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self._cast: dict[tuple[str, str], str] = {}
        self._count = 0

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.add_many(kind, 1, *inputs, **attributes)[0]

    def add_many(self, kind: str, number: int, *inputs: str, **attributes: Any) -> list[str]:
        self._count += 1
        name = f"{kind}_{self._count}"
        outputs = [name if number == 1 else f"{name}_{index}" for index in range(number)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: str | None = None) -> str:
        """Store a constant, once for equal ones. Whole numbers become int64, others have the computed dtype."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else dtype or self.computed)
        key = f"constant_{array.dtype}_{array.shape}_{hash(array.tobytes()):x}"
        self.weights.setdefault(key, numpy_helper.from_array(np.ascontiguousarray(array), key))
        return key

    def weight(self, name: str, value: Tensor, dtype: str | None = None) -> str:
        """Store a weight. Where `dtype` is given, it is stored and used in that dtype."""
        stored, used = dtype or self.stored, dtype or self.computed
        if name not in self.weights:
            array = value.detach().float().contiguous().numpy().astype(stored)
            self.weights[name] = numpy_helper.from_array(array, name)
        return name if stored == used else self.cast(name, used)

    def cast(self, x: str, dtype: str) -> str:
        """Convert to a dtype, once."""
        if (x, dtype) not in self._cast:
            self._cast[x, dtype] = self.add("Cast", x, to=_TYPES[dtype])
        return self._cast[x, dtype]

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; the first dimension, which contains the batch, is inferred."""
        return self.add("Reshape", x, self.constant([-1, *shape]))

    def transpose(self, x: str, *order: int) -> str:
        return self.add("Transpose", x, perm=order)

    def gather(self, x: str, rows: Any) -> str:
        """Read rows along the second dimension."""
        return self.add("Gather", x, self.constant(np.asarray(rows)), axis=1)

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Split along a dimension. Many parts are sliced one by one, because a WebGPU shader has few buffers."""
        if len(sizes) <= MAX_OUTPUTS:
            return self.add_many("Split", len(sizes), x, self.constant(list(sizes)), axis=axis)
        return [
            self.add("Slice", x, *(self.constant([value]) for value in (end - size, end, axis)))
            for end, size in zip(accumulate(sizes), sizes, strict=True)
        ]

    def pad(self, x: str, after: Sequence[int], before: Sequence[int] = (0, 0, 0, 0)) -> str:
        """Pad with zeros; negative numbers crop."""
        return self.add("Pad", x, self.constant([*before, *after])) if any([*before, *after]) else x

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def softplus(self, z: str) -> str:
        """Compute log(1 + e^z) as max(z, 0) + log(1 + u), u = e^-|z|, because runtimes compute Softplus slowly.

        The rounding error of 1 + u is measured and added after the logarithm, which keeps small results precise.
        """
        one = self.constant(1.0, "float32")
        u = self.add("Exp", self.add("Neg", self.add("Abs", z)))
        rounded = self.add("Add", u, one)
        error = self.add("Sub", u, self.add("Sub", rounded, one))
        log = self.add("Add", self.add("Log", rounded), self.add("Div", error, rounded))
        return self.add("Add", self.add("Relu", z), log)


def build(
    network: LaMambaDiff, size: tuple[int, int], *, guided: bool, stored: str, computed: str, metadata: dict[str, str]
) -> Any:
    """Write the network as an ONNX model.

    Args:
        network: on the CPU.
        size: height and width of the grid, even.
        guided: add the input `guidance`, a scale, and return guided predictions.
        stored: dtype of the weights in the file, "float32" or "float16".
        computed: dtype of activations; the state of the scan is float32.
        metadata: properties of the model.

    Returns:
        An `onnx.ModelProto`. Inputs: x_t (b, c, h, w) float32, t (b,) float32, y (b,) int64 and, if guided, guidance ()
        float32. Output: prediction (b, 2c, h, w) float32.
    """
    graph, channels = _NetworkGraph(network, stored, computed), int(network.config.in_channels)
    x_t, t, y = "x_t", "t", "y"
    if guided:
        null = graph.add("Add", graph.add("Mul", y, graph.constant(0)), graph.constant(network.null_label))
        x_t, t = (graph.add("Concat", value, value, axis=0) for value in (x_t, t))
        y = graph.add("Concat", y, null, axis=0)
    out = graph.emit(x_t, t, y, size)
    if guided:
        labelled, other = graph.add_many("Split", 2, out, axis=0, num_outputs=2)
        predicted, variance = graph.split(labelled, 1, [channels, channels])
        worse, _ = graph.split(other, 1, [channels, channels])
        moved = graph.add("Mul", "guidance", graph.add("Sub", predicted, worse))
        out = graph.add("Concat", graph.add("Add", worse, moved), variance, axis=1)
    graph.nodes.append(helper.make_node("Identity", [out], ["prediction"]))

    described = helper.make_tensor_value_info
    inputs = [
        described("x_t", TensorProto.FLOAT, ["batch", channels, *size]),
        described("t", TensorProto.FLOAT, ["batch"]),
        described("y", TensorProto.INT64, ["batch"]),
        *([described("guidance", TensorProto.FLOAT, [])] if guided else []),
    ]
    outputs = [described("prediction", TensorProto.FLOAT, ["batch", 2 * channels, *size])]
    whole = helper.make_graph(graph.nodes, "lamamba", inputs, outputs, list(graph.weights.values()))
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "lamamba"
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


class _NetworkGraph(Graph):
    """Adds the parts of a network, each like the forward pass of its module, on (b, h, w, c)."""

    def __init__(self, network: LaMambaDiff, stored: str, computed: str) -> None:
        super().__init__(stored, computed)
        self.net: Any = network  # modules in lists have no types
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}

    def parameter(self, value: Tensor, changed: Tensor | None = None, dtype: str | None = None) -> str:
        """Store a parameter under its name, in another layout if `changed` is given."""
        return self.weight(self.names[id(value)], value if changed is None else changed, dtype)

    def emit(self, x_t: str, t: str, y: str, size: tuple[int, int]) -> str:
        """Add the whole network; return the prediction (b, 2c, h, w) in float32."""
        net = self.net
        x = self.linear(self.to_computed(self.transpose(x_t, 0, 2, 3, 1)), net.patch_projection)
        x = self.norm(x, net.patch_norm)
        x = self.add("Add", x, self.weight("position_embedding", net.resize_position_embedding(*size)))
        condition = self.add("Add", self.timestep(t), self.add("Gather", self.parameter(net.label_embedding.weight), y))

        skips = []
        for index, blocks in enumerate(net.encoder):
            x = self.blocks(blocks, x, condition, size)
            skips.append((x, size))
            if index < len(net.downsamples):
                x, size = self.downsample(x, net.downsamples[index], size)
        x = self.add("Add", x, self.blocks(net.bottleneck, x, condition, size))
        for index, blocks in enumerate(net.decoder):
            skip, size = skips.pop()
            if index >= 2:
                x = self.upsample(x, net.upsamples[index - 2], size)
            x = self.blocks(blocks, self.add("Add", x, skip), condition, size)
        return self.to_float(self.transpose(self.head(x, condition), 0, 3, 1, 2))

    def to_computed(self, x: str) -> str:
        return x if self.computed == "float32" else self.cast(x, self.computed)

    def to_float(self, x: str) -> str:
        return x if self.computed == "float32" else self.cast(x, "float32")

    def linear(self, x: str, layer: nn.Linear) -> str:
        x = self.add("MatMul", x, self.parameter(layer.weight, layer.weight.mT))
        return self.add("Add", x, self.parameter(layer.bias)) if layer.bias is not None else x

    def norm(self, x: str, norm: nn.LayerNorm, dtype: str | None = None) -> str:
        weight, bias = self.parameter(norm.weight, dtype=dtype), self.parameter(norm.bias, dtype=dtype)
        return self.add("LayerNormalization", x, weight, bias, epsilon=norm.eps)

    def modulate(self, x: str, shift: str, scale: str) -> str:
        """Compute x (1 + scale) + shift."""
        return self.add("Add", self.add("Mul", x, self.add("Add", scale, self.constant(1.0))), shift)

    def timestep(self, t: str) -> str:
        embedding = self.net.timestep_embedding
        half = embedding.num_sinusoids // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / half))
        angles = self.add("Mul", self.reshape(t, 1), self.constant(frequencies.numpy()[None], "float32"))
        sinusoids = self.add("Concat", self.add("Cos", angles), self.add("Sin", angles), axis=1)
        return self.linear(self.silu(self.linear(self.to_computed(sinusoids), embedding.linear_1)), embedding.linear_2)

    def blocks(self, blocks: Iterable[Block], x: str, condition: str, size: tuple[int, int]) -> str:
        """Add blocks; a list without blocks returns x."""
        for block in blocks:
            width = block.mlp_norm.normalized_shape[0]
            projection = block.condition_projection
            own = self.linear(condition, projection) if isinstance(projection, nn.Linear) else condition
            channels = block.modulation.out_features
            modulation = self.reshape(self.linear(self.silu(own), block.modulation), 1, 1, channels)
            parts = iter(self.split(modulation, 3, [width] * (channels // width)))
            for branch, norm in block._branches():
                shift, scale, gate = next(parts), next(parts), next(parts)
                normed = self.modulate(self.norm(x, norm), shift, scale)
                x = self.add("Add", x, self.add("Mul", self.branch(normed, branch, size), gate))
        return x

    def branch(self, x: str, branch: Any, size: tuple[int, int]) -> str:
        if isinstance(branch, SS2D):
            return self.scan(x, branch, size)
        return self.attention(x, branch, size) if isinstance(branch, WindowAttention) else self.mlp(x, branch)

    def mlp(self, x: str, mlp: Mlp) -> str:
        return self.linear(self.add("Gelu", self.linear(x, mlp.linear_1)), mlp.linear_2)

    def attention(self, x: str, attention: WindowAttention, size: tuple[int, int]) -> str:
        """Add window attention. Queries, keys and values are computed from pixels in the order of the windows."""
        heads, length = attention.num_heads, math.prod(size)
        geometry = window_geometry(*size, attention.window_size, attention.shifted, torch.device("cpu"))
        (windows, places), channels = geometry.pixels.shape, attention.out_proj.in_features
        pixels = geometry.pixels.flatten().numpy()
        x = self.reshape(x, length, channels)
        is_in_order = np.array_equal(pixels, np.arange(length))
        if not is_in_order:
            x = self.gather(x, np.where(pixels < 0, 0, pixels))  # the mask excludes padding, whatever it holds
        qkv = self.reshape(self.linear(x, attention.qkv), windows, places, 3, heads, channels // heads)
        query, key, value = self.split(qkv, 3, [1, 1, 1])
        shape = windows, places, heads, channels // heads
        query, key, value = (self.reshape(part, *shape) for part in (query, key, value))
        query, value = (self.transpose(part, 0, 1, 3, 2, 4) for part in (query, value))
        query = self.add("Mul", query, self.constant((channels // heads) ** -0.5))
        table = self.parameter(attention.relative_position_bias)
        bias = self.add("Gather", table, self.constant(geometry.offsets.numpy()), axis=0)
        added = self.transpose(bias, 2, 0, 1)
        if geometry.mask is not None:
            mask = geometry.mask.clamp(min=-3e4)[:, None].numpy()  # in float16, -inf less a maximum may be NaN
            added = self.add("Add", added, self.constant(mask))
        logits = self.add("Add", self.add("MatMul", query, self.transpose(key, 0, 1, 3, 4, 2)), added)
        x = self.add("MatMul", self.add("Softmax", logits, axis=-1), value)
        x = self.reshape(self.transpose(x, 0, 1, 3, 2, 4), windows * places, channels)
        if not is_in_order:
            x = self.gather(x, np.argsort(pixels)[-length:])  # padding is -1
        return self.linear(self.reshape(x, *size, channels), attention.out_proj)

    def scan(self, x: str, ssm: SS2D, size: tuple[int, int]) -> str:
        inner = ssm.A_log.shape[1]
        weights = ssm.in_proj.weight.chunk(2)
        name = self.names[id(ssm.in_proj.weight)]
        x, z = (
            self.add("MatMul", x, self.weight(f"{name}.{part}", weight.mT))
            for part, weight in zip("xz", weights, strict=True)
        )
        convolution = [self.parameter(value) for value in ssm.convolution.parameters()]
        x = self.add(
            "Conv", self.transpose(x, 0, 3, 1, 2), *convolution, group=inner, pads=[1] * 4, kernel_shape=[3, 3]
        )
        x = self.transpose(self.silu(x), 0, 2, 3, 1)
        y = self.paths(self.to_float(x), x, ssm, size)  # float32, because sums over a path may exceed float16
        y = self.add("Mul", self.to_computed(self.norm(y, ssm.out_norm, "float32")), self.silu(z))
        return self.linear(y, ssm.out_proj)

    def paths(self, u: str, x: str, ssm: SS2D, size: tuple[int, int]) -> str:
        """Scan along the four paths, and add up the results at each pixel. The state is float32."""
        length = math.prod(size)
        inner, num_states, rank = *ssm.A_log.shape[1:], ssm.dt_rank
        paths = scan_paths(*size, ssm.scan, torch.device("cpu"))
        low = self.add("MatMul", x, self.parameter(ssm.x_proj_weight, ssm.x_proj_weight.flatten(0, 1).mT))
        low = self.gather(self.reshape(low, length * NUM_PATHS, rank + 2 * num_states), paths.projections.numpy())
        low = self.reshape(low, NUM_PATHS, length, rank + 2 * num_states)
        delta_low, B, C = self.split(low, 3, [rank, num_states, num_states])
        delta = self.to_float(self.add("MatMul", delta_low, self.parameter(ssm.dt_weight, ssm.dt_weight.mT)))
        bias = self.parameter(ssm.dt_bias, ssm.dt_bias[:, None], "float32")
        delta = self.softplus(self.add("Add", delta, bias))
        A = self.add("Neg", self.add("Exp", self.parameter(ssm.A_log, ssm.A_log.mT, "float32")))  # (4, n, e)
        u = self.reshape(u, length, inner)
        driven = self.add("Mul", delta, self.reshape(self.gather(u, paths.pixels.numpy()), NUM_PATHS, length, inner))
        B, C = self.to_float(B), self.to_float(C)
        if num_states == 1:
            decay = self.add("Exp", self.add("Mul", delta, A))
            y = self.add("Mul", self.recurrence(decay, self.add("Mul", driven, B), length, inner), C)
        else:
            y = self.several_states(delta, driven, A, B, C, (length, inner, num_states))
        y = self.gather(self.reshape(y, NUM_PATHS * length, inner), paths.pixel_positions.flatten().numpy())
        y = self.add("ReduceSum", self.reshape(y, NUM_PATHS, length, inner), self.constant([1]), keepdims=0)
        # Every path reads every pixel once, so the four D add up.
        total = self.add("ReduceSum", self.parameter(ssm.D, dtype="float32"), self.constant([0]), keepdims=1)
        return self.reshape(self.add("Add", y, self.add("Mul", u, total)), *size, inner)

    def recurrence(self, a: str, x: str, length: int, inner: int) -> str:
        """Compute h[t] = a[t] h[t-1] + x[t] along the third dimension of (b, 4, length, inner), in blocks."""
        chunk = min(length, CHUNK)
        num_chunks = -(-length // chunk)
        fill = [0, 0, num_chunks * chunk - length, 0]
        a, x = (self.reshape(self.pad(value, fill), NUM_PATHS, num_chunks, chunk, inner) for value in (a, x))
        factors, inputs = (self.split(value, 3, [1] * chunk) for value in (a, x))
        h, decay = [inputs[0]], [factors[0]]
        for factor, value in zip(factors[1:], inputs[1:], strict=True):
            h.append(self.add("Add", self.add("Mul", factor, h[-1]), value))
            if num_chunks > 1:
                decay.append(self.add("Mul", factor, decay[-1]))
        y = self.add("Concat", *h, axis=3)
        if num_chunks > 1:
            ends = [self.reshape(value, NUM_PATHS, num_chunks, inner) for value in (decay[-1], h[-1])]
            before = self.pad(self.recurrence(ends[0], ends[1], num_chunks, inner), [0, 0, -1, 0], [0, 0, 1, 0])
            before = self.reshape(before, NUM_PATHS, num_chunks, 1, inner)
            y = self.add("Add", y, self.add("Mul", self.add("Concat", *decay, axis=3), before))
        y = self.reshape(y, NUM_PATHS, num_chunks * chunk, inner)
        return self.pad(y, [-number for number in fill])

    def several_states(self, delta: str, driven: str, A: str, B: str, C: str, shape: tuple[int, int, int]) -> str:
        """Walk along the paths with the operator Scan, whose body takes a few steps."""
        length, inner, num_states = shape
        num_chunks = -(-length // STEPS)

        def in_chunks(x: str, *shape: int) -> str:
            x = self.transpose(self.pad(x, [0, 0, num_chunks * STEPS - length, 0]), 2, 0, 1, 3)
            return self.add("Reshape", x, self.constant([num_chunks, STEPS, -1, NUM_PATHS, *shape]))

        chunks = [
            in_chunks(delta, 1, inner),
            in_chunks(driven, 1, inner),
            in_chunks(B, num_states, 1),
            in_chunks(C, 1, num_states),
        ]
        batch = self.add("Shape", delta, start=0, end=1)
        sizes = (self.constant([1]), batch, self.constant([NUM_PATHS, num_states, inner]))
        start = self.add("ConstantOfShape", self.add("Concat", *sizes, axis=0))
        outside, self.nodes = self.nodes, []
        names = [f"{start}_{part}" for part in ("h", "delta", "driven", "B", "C")]
        h, delta, driven, B, C = names
        factors, inputs = (
            self.split(value, 0, [1] * STEPS)
            for value in (self.add("Exp", self.add("Mul", delta, A)), self.add("Mul", driven, B))
        )
        states = []
        for factor, value in zip(factors, inputs, strict=True):
            h = self.add("Add", self.add("Mul", factor, h), value)
            states.append(h)
        y = self.add("MatMul", C, self.add("Concat", *states, axis=0))
        described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*names, h, y)]
        body = helper.make_graph(self.nodes, f"{start}_steps", described[:5], described[5:])
        self.nodes = outside
        _, y = self.add_many("Scan", 2, start, *chunks, body=body, num_scan_inputs=4)
        y = self.add("Reshape", y, self.constant([num_chunks * STEPS, -1, NUM_PATHS, inner]))
        y = self.transpose(y, 1, 2, 0, 3)
        return self.pad(y, [0, 0, length - num_chunks * STEPS, 0])

    def downsample(
        self, x: str, layer: MergeDownsample | ConvDownsample, size: tuple[int, int]
    ) -> tuple[str, tuple[int, int]]:
        """Halve the grid; also return its new size."""
        height, width = size
        x = self.pad(x, [0, height % 2, width % 2, 0])
        half = -(-height // 2), -(-width // 2)
        if isinstance(layer, ConvDownsample):
            x = self.transpose(x, 0, 3, 1, 2)
            weights = [self.parameter(value) for value in layer.convolution.parameters()]
            x = self.add("Conv", x, *weights, strides=[2, 2], kernel_shape=[2, 2])
            return self.norm(self.transpose(x, 0, 2, 3, 1), layer.norm), half
        channels = layer.norm.normalized_shape[0]
        x = self.transpose(self.reshape(x, half[0], 2, half[1], 2, channels // 4), 0, 1, 3, 4, 2, 5)
        return self.linear(self.norm(self.reshape(x, *half, channels), layer.norm), layer.reduction), half

    def upsample(self, x: str, layer: Upsample, size: tuple[int, int]) -> str:
        """Double the grid, and crop it to a size."""
        channels = layer.norm.normalized_shape[0]
        height, width = -(-size[0] // 2), -(-size[1] // 2)
        x = self.reshape(self.linear(x, layer.expansion), height, width, 2, 2, channels)
        x = self.reshape(self.transpose(x, 0, 1, 3, 2, 4, 5), 2 * height, 2 * width, channels)
        return self.pad(self.norm(x, layer.norm), [0, size[0] - 2 * height, size[1] - 2 * width, 0])

    def head(self, x: str, condition: str) -> str:
        head = self.net.head
        x = self.norm(self.linear(x, head.linear), head.norm)
        modulation = self.linear(self.silu(self.linear(condition, head.condition_projection)), head.modulation)
        width = head.linear.out_features
        shift, scale = self.split(self.reshape(modulation, 1, 1, 2 * width), 3, [width, width])
        x = self.add("LayerNormalization", x, self.constant(np.ones(width)), epsilon=1e-6)
        return self.linear(self.modulate(x, shift, scale), head.output)
