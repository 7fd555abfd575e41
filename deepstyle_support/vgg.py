"""VGG16 and VGG19 as tables: which layers there are, how wide, how far apart and how far they see. Nothing is computed.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014, arXiv 1409.1556).
"""

from collections.abc import Collection

from .messages import require_choice

PICTURE = "picture"  # what stands for a layer where the picture itself is looked at
# The convolutional layers of each network in order, with the number of their output channels.
CHANNELS = {
    model: {
        f"conv{block}_{layer}": channels
        for block, (channels, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True), 1)
        for layer in range(1, depth + 1)
    }
    for model, depths in (("vgg16", (2, 2, 3, 3, 3)), ("vgg19", (2, 2, 4, 4, 4)))
}


# The block of each layer, by the poolings before it.
BLOCKS = {name: int(name[len("conv")]) for layers in CHANNELS.values() for name in layers}


def layer_name(flag: str, name: str, model: str) -> str:
    """The paper's name of a layer given by it or by Keras's: conv4_2 for block4_conv2."""
    require_choice("--model", model, CHANNELS)
    paper = name.replace("block", "conv").replace("_conv", "_")
    require_choice(flag, paper if paper in CHANNELS[model] else name, CHANNELS[model])
    return paper


def keras_name(name: str) -> str:
    """Keras's name of a layer: block4_conv2 for conv4_2."""
    return name.replace("conv", "block").replace("_", "_conv")


def stride(layer: str) -> int:
    """Pixels from one position of a layer to the next; 1 for PICTURE, the picture itself."""
    return 1 if layer == PICTURE else 2 ** (BLOCKS[layer] - 1)


def deepest(layers: Collection[str], model: str) -> str:
    """The last of `layers` in the network."""
    return [name for name in CHANNELS[model] if name in layers][-1]


def halo(layers: Collection[str], model: str) -> int:
    """Pixels around a position of the deepest of `layers` that can change its features, in whole strides.

    Each 3 x 3 convolution up to there looks one position further, which is as many pixels as its stride.
    """
    names, last = list(CHANNELS[model]), deepest(layers, model)
    reach = sum(stride(name) for name in names[: names.index(last) + 1])
    return -(-reach // stride(last)) * stride(last)
