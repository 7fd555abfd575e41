"""The losses once more, in float64 NumPy and straight from their formulas, to check the program against.

It shares nothing with deepstyle.py but the weights it is given.
"""

import numpy as np

MEAN_BGR = np.array([103.939, 116.779, 123.68])
STYLE_LAYERS = ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1"]


def to_input_space(picture):
    return picture[..., ::-1].astype(np.float64) - MEAN_BGR


def convolve(x, kernel, bias, padding="zeros"):
    """A 3x3 convolution, as nine shifted matrix products; beyond the border there are zeros, or the edge's values."""
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), {"zeros": "constant", "edge": "edge"}[padding])
    kernel = kernel.astype(np.float64)
    return bias + sum(padded[i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def pool(x, pool_type):
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    blocks = np.stack([x[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)])
    return blocks.mean(0) if pool_type == "ave" else blocks.max(0)


def features(x, weights, pool_type, padding="zeros"):
    """{layer: (h, w, C)} of all 13 layers."""
    found = {}
    for block, depth in enumerate([2, 2, 3, 3, 3], 1):
        if block > 1:
            x = pool(x, pool_type)
        for layer in range(1, depth + 1):
            name = f"conv{block}_{layer}"
            kernel, bias = weights[name]
            x = np.maximum(convolve(x, kernel, bias, padding), 0)
            found[name] = x
    return found


def gram(f):
    flat = f.reshape(-1, f.shape[-1])
    return flat.T @ flat


def targets(content, style, weights, pool_type, padding="zeros"):
    """The content picture's features and the style picture's Grams. content, style: uint8 RGB."""
    f_style = features(to_input_space(style), weights, pool_type, padding)
    grams = {name: gram(f_style[name]) for name in STYLE_LAYERS}
    return features(to_input_space(content), weights, pool_type, padding), grams


def losses(x, targets, weights, *, pool_type="ave", padding="zeros", content_layer="conv5_2"):
    """The unweighted content, style and total variation losses of x."""
    f_content, style_grams = targets
    size = x.shape[0] * x.shape[1]
    f = features(x, weights, pool_type, padding)
    content_loss = ((f[content_layer] - f_content[content_layer]) ** 2).sum()
    style_loss = sum(((style_grams[name] - gram(f[name])) ** 2).sum() / (4 * 3**2 * size**2) for name in STYLE_LAYERS)
    down = x[:-1, :-1] - x[1:, :-1]
    right = x[:-1, :-1] - x[:-1, 1:]
    return content_loss, style_loss / 5, ((down**2 + right**2) ** 1.25).sum()
