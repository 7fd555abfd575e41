"""What a person would use instead: the same loss written plainly in PyTorch, minimised by its own L-BFGS.

usage: python benchmarks/plain_pytorch.py CONTENT STYLE PREFIX [--rows 400] [--num_iter 10] [--full] [--weights random]

It saves PREFIX_at_iteration_N.png after every 20 evaluations, as deepstyle does, on a GPU if PyTorch sees one. Its
convolutions are rounded as PyTorch rounds them by itself (TF32 on NVIDIA's GPUs since Ampere); with --full they are
not. The last line is JSON: seconds of an evaluation within the run (median), seconds from the beginning of the script's
work until the first one is there, and the GPU's memory at the peak.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from race import CONTENT, STYLE, VARIATION, resized
from torch.nn import functional

import deepstyle
from deepstyle_support.images import from_input_space, to_input_space
from deepstyle_support.settings import STYLE_LAYERS
from deepstyle_support.weights import Weights

EVALUATIONS = 20  # of an iteration


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def channels_first(picture: np.ndarray) -> Any:
    """(1, 3, H, W) in input space, where it is computed."""
    return torch.tensor(to_input_space(picture), device=device()).permute(2, 0, 1)[None].contiguous()


def loss_of(content: np.ndarray, style: np.ndarray, weights: Weights) -> Callable:
    """A function of x, (1, 3, H, W) in input space, that returns its loss; the pictures are (H, W, 3) uint8 RGB."""
    network = {
        name: (
            torch.tensor(kernel, device=device()).permute(3, 2, 0, 1).contiguous(),
            torch.tensor(bias, device=device()),
        )
        for name, (kernel, bias) in weights.items()
    }
    size = content.shape[0] * content.shape[1]

    def features(x: Any) -> dict:
        found = {}
        for name, (kernel, bias) in network.items():
            if name > "conv5_2":
                break
            if name.endswith("_1") and name != "conv1_1":
                x = functional.avg_pool2d(x, 2)
            x = functional.relu(functional.conv2d(x, kernel, bias, padding=1))
            if name in (*STYLE_LAYERS, "conv5_2"):
                found[name] = x
        return found

    def gram(f: Any) -> Any:
        flat = f.flatten(2)[0]
        return flat @ flat.T

    with torch.no_grad():
        content_target = features(channels_first(content))["conv5_2"]
        found = features(channels_first(style))
        style_targets = {name: gram(found[name]) for name in STYLE_LAYERS}

    def loss(x: Any) -> Any:
        found = features(x)
        total = CONTENT * ((found["conv5_2"] - content_target) ** 2).sum()
        for name, target in style_targets.items():
            total = total + STYLE * (((target - gram(found[name])) / (6 * size)) ** 2).sum()
        corner = x[..., :-1, :-1]
        square = (corner - x[..., 1:, :-1]) ** 2 + (corner - x[..., :-1, 1:]) ** 2
        return total + VARIATION * (square**1.25).sum()

    return loss


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("content", "style", "prefix"):
        parser.add_argument(name)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--num_iter", type=int, default=10)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--weights")
    arguments = parser.parse_args()
    if arguments.full:
        torch.backends.cudnn.allow_tf32 = False
    content, style = resized([arguments.content, arguments.style], arguments.rows)
    weights, _ = deepstyle.load_weights(arguments.weights)
    loss = loss_of(content, style, weights)
    x = channels_first(content).requires_grad_()
    optimiser = torch.optim.LBFGS([x], max_iter=EVALUATIONS)
    times: list[float] = []

    def closure() -> Any:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        float(value.detach())  # as anyone would who prints it; it waits for the GPU
        times.append(time.perf_counter())
        return value

    for number in range(1, arguments.num_iter + 1):
        optimiser.step(closure)
        picture = from_input_space(x.detach()[0].permute(1, 2, 0).cpu().numpy())
        Image.fromarray(picture).save(f"{arguments.prefix}_at_iteration_{number}.png")
    seconds = statistics.median(np.diff(times)[1:])
    peak = torch.cuda.max_memory_allocated() if device() == "cuda" else 0
    print(json.dumps({"seconds": seconds, "until_first": times[0] - began, "gpu_peak": peak}))


if __name__ == "__main__":
    main()
