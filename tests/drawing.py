"""What hypothesis draws for the operators: rows of any shape, stride, dtype and kind of number."""

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DRAWN = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BROKEN = (math.nan, math.inf, -math.inf)
SCALES = (0.0, 1e-44, 1e-40, 1e-20, 1e-6, 1.0, 1e6, 1e15)
HUGE = (1e30, 3e37)


def generator(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 999)))


def numbers(draw, *shape, scales=SCALES, broken=BROKEN):
    """Draw a float32 tensor: noise, whole numbers or copies of few rows, some rows or numbers special."""
    g = generator(draw)
    x = torch.randn(*shape, generator=g)
    kind = draw(st.sampled_from(["noise", "whole", "copies", "offset"]))
    if kind == "whole":
        x = x.round()
    if kind == "copies" and x.shape[0]:
        x = x[torch.randint(draw(st.integers(1, x.shape[0])), (x.shape[0],), generator=g)].clone()
    if kind == "offset":
        x = x * 0.01 + 50
    if x.numel() == 0:
        return x
    factor = torch.ones(x.shape[0])
    for scale in draw(st.lists(st.sampled_from(scales), max_size=3)):
        first, step = draw(st.integers(0, x.shape[0] - 1)), draw(st.integers(1, x.shape[0]))
        factor[first::step] = scale
    x *= factor.view(-1, *[1] * (x.dim() - 1))
    for value in draw(st.lists(st.sampled_from((*broken, 0.0, -0.0, 1e-42, 127.0)), max_size=3)):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return x


def laid_out(draw, x):
    """Draw how the tensor lies in memory; what lies between its numbers is NaN."""
    layout = draw(st.sampled_from(["dense", "every second", "columns first", "part of wider rows"]))
    if layout == "dense" or x.dim() < 2:
        return x
    if layout == "columns first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    width, step = x.shape[-1], 2 if layout == "every second" else 1
    wide = x.new_full((*x.shape[:-1], 3 + width * step), math.nan)
    wide[..., 3::step] = x
    return wide[..., 3::step]


def rows(draw, *shape, dtype=None, **kinds):
    """Draw a tensor of numbers in any layout and dtype."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    return laid_out(draw, numbers(draw, *shape, **kinds).to(dtype))
