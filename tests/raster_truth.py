"""The autoregressive network's equations in float64, and toys of it."""

import numpy as np
import torch

from dinofast.models.spatial_ar import SpatialAR
from dinofast.types import Features

SIZE = (48, 60)
SEEN = {  # rows of a kernel, x a tap that is there: of the first layer, of the others
    "causal": ("xxx x.. ...", "xxx xx. ..."),
    "bidirectional": ("xxx x.x xxx", "xxx xxx xxx"),
    "standard": ("xxx xxx xxx", "xxx xxx xxx"),
}


def features(b=4, h=6, w=7, d=5, seed=0):
    """Smooth, so that neighbors tell of each other."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.linspace(0, 3, h)[:, None, None] + torch.linspace(0, 2, w)[:, None] * torch.rand(
        d, generator=draw
    )
    noise = torch.randn(b, h, w, d, generator=draw)
    return Features(torch.sin(place) + 0.1 * noise, None, SIZE)


def tiny(**params):
    return SpatialAR(**{"dilations": 1, "n_layers": 2, "hidden": 6, "n_epochs": 2, "batch_size": 2} | params)


def with_weights(model, d=5, seed=1):
    """Give a model random weights, as if fitted."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for direction in ("forward", "backward")[: 1 + (model.direction != "forward")]:
        widths = [d] + [model.hidden] * (model.n_layers - 1) + [d]
        for i in range(model.n_layers):
            taps = SEEN[model.mode][i > 0].count("x")
            state[f"{direction}.{i}.weight"] = 0.4 * torch.randn(taps, *widths[i : i + 2], generator=draw)
            state[f"{direction}.{i}.bias"] = torch.randn(widths[i + 1], generator=draw)
    model.load_state(state)
    return model


def kernel_of(weight, mode, layer):
    """Put tap matrices (T, C_in, C_out) where their taps are: (3, 3, C_in, C_out), zeros elsewhere."""
    rows = SEEN[mode][layer > 0].split()
    taps = [(y, x) for y in range(3) for x in range(3) if rows[y][x] == "x"]
    kernel = np.zeros((3, 3, *weight.shape[1:]))
    for (y, x), matrix in zip(taps, np.asarray(weight, dtype=np.float64), strict=True):
        kernel[y, x] = matrix
    return kernel


def convolve(x, kernel, bias, step):
    """One layer on one map (h, w, C_in), tap by tap and patch by patch."""
    h, w = x.shape[:2]
    out = np.tile(bias, (h, w, 1))
    for y in range(h):
        for c in range(w):
            for ky in range(3):
                for kx in range(3):
                    sy, sx = y + (ky - 1) * step, c + (kx - 1) * step
                    if 0 <= sy < h and 0 <= sx < w:
                        out[y, c] += x[sy, sx] @ kernel[ky, kx]
    return out


def predict(x, kernels, biases, steps):
    for i, (kernel, bias, step) in enumerate(zip(kernels, biases, steps, strict=True)):
        x = convolve(x, kernel, bias, step)
        if i < len(kernels) - 1:
            x = np.maximum(x, 0)
    return x


def error_of(model, x, direction):
    """Patch scores (h, w) of one map by one network of a model, in float64."""
    state = {n: t.double().numpy() for n, t in model.state().items()}
    kernels = [kernel_of(state[f"{direction}.{i}.weight"], model.mode, i) for i in range(model.n_layers)]
    biases = [state[f"{direction}.{i}.bias"] for i in range(model.n_layers)]
    given = model.dilations if isinstance(model.dilations, list) else [model.dilations]
    steps = [*given, *[given[-1]] * model.n_layers][: model.n_layers]
    turned = x[::-1, ::-1] if direction == "backward" else x
    found = predict(turned, kernels, biases, steps)
    if direction == "backward":
        found = found[::-1, ::-1]
    if model.loss == "mse":
        return ((found - x) ** 2).mean(2)
    return 1 - (found * x).sum(2) / np.sqrt((found**2).sum(2) * (x**2).sum(2))
