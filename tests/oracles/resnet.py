"""ResNet in evaluation mode, one output cell at a time, from the paper's words (He et al. 2016); slow and obvious. Float64."""

from collections.abc import Mapping

import numpy as np

BN_EPS = 1e-5


def convolve(x_CHW: np.ndarray, kernel_OCkk: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation with zeros around the map, as many as keep the size at stride 1."""
    n_out, _, k, _ = kernel_OCkk.shape
    padded = np.pad(x_CHW, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    height, width = ((side - 1) // stride + 1 for side in x_CHW.shape[1:])
    out = np.empty((n_out, height, width))
    for y in range(height):
        for x in range(width):
            window = padded[:, y * stride : y * stride + k, x * stride : x * stride + k]
            out[:, y, x] = kernel_OCkk.reshape(n_out, -1) @ window.reshape(-1)
    return out


def largest_of_3x3(x_CHW: np.ndarray) -> np.ndarray:
    """Largest value around every second cell; nothing lies beyond the border."""
    padded = np.pad(x_CHW, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    height, width = ((side - 1) // 2 + 1 for side in x_CHW.shape[1:])
    out = np.empty((x_CHW.shape[0], height, width))
    for y in range(height):
        for x in range(width):
            out[:, y, x] = padded[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3].max(axis=(1, 2))
    return out


def resnet_last_map(weights: Mapping[str, np.ndarray], image_CHW: np.ndarray, stages: tuple[int, ...]) -> np.ndarray:
    """The last map [2048, h, w] of one image; `stages` are the numbers of blocks."""

    def norm(x_CHW: np.ndarray, name: str) -> np.ndarray:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        gain, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return ((x_CHW.T - mean) / np.sqrt(var + BN_EPS) * gain + bias).T

    def conv_norm(x_CHW: np.ndarray, conv: str, bn: str, stride: int = 1) -> np.ndarray:
        return norm(convolve(x_CHW, weights[f"{conv}.weight"], stride), bn)

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    x = largest_of_3x3(relu(conv_norm(image_CHW, "conv1", "bn1", stride=2)))
    for stage, n_blocks in enumerate(stages, start=1):
        for i in range(n_blocks):
            block, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            shortcut = x if i else conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            y = relu(conv_norm(x, f"{block}.conv1", f"{block}.bn1"))
            y = relu(conv_norm(y, f"{block}.conv2", f"{block}.bn2", stride))
            x = relu(conv_norm(y, f"{block}.conv3", f"{block}.bn3") + shortcut)
    return x
