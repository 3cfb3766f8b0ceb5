"""upsample_blur, and the last step of cosine_map: every pixel gathers the patches that it has a weight in."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from dinofast.kernels.tile import DTYPES, Variant
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 8, 64
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
MOST_PAIRS = 64
"""Most patches that a pixel gathers in one launch; beyond, columns are resampled first, then rows."""


@dataclass(frozen=True)
class Axis:
    """The weights of one axis: pixel i takes weight[i, e] of patch index[i, e]; index -1 is no patch.

    Attributes:
        index: (pixels, E), int32, contiguous.
        weight: (pixels, E), float32, contiguous.
        blocks: see `blocks`; empty where nobody asks.
    """

    index: Tensor
    weight: Tensor
    blocks: Mapping[int, int] = field(default_factory=dict)


def blocks(index: Tensor, *patches: int) -> dict[int, int]:
    """Find blocks of pixels that touch few patches: a power of two up to 64, at least 1.

    Args:
        index: as of `Axis`, on the CPU.
        patches: how many neighboring patches a block may touch, each at least what a single pixel does.

    Returns:
        Each of `patches` -> the most pixels of a block that starts at a multiple of its length.
    """
    first = torch.where(index < 0, index.max() + 1, index).amin(1)
    last = index.amax(1)

    def span(size: int) -> int:
        starts = range(0, len(index), size)
        return max(int(last[i : i + size].max() - first[i : i + size].min()) + 1 for i in starts)

    sizes = [1 << i for i in range(7)]
    return {most: max((s for s in sizes if span(s) <= most), default=1) for most in patches}


@triton.jit
def gather(
    patches, mask, row_index, row_weight, column_index, column_weight, pixels,
    h, w, height, width, row_entries, column_entries,
    SIMILARITY: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill a block of pixels; with SIMILARITY a patch counts as 1 - its value, with MASKED or else as 0.

    A patch without weight is never added, so its NaN or inf goes nowhere.
    """
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tile // across % down * ROWS + tl.arange(0, ROWS)
    image = (tile // across // down).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(row_entries):
        y = tl.load(row_index + row * row_entries + i, mask=row < height, other=-1)
        y_weight = tl.load(row_weight + row * row_entries + i, mask=row < height, other=0.0)
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for j in range(column_entries):
            x = tl.load(column_index + column * column_entries + j, mask=column < width, other=-1)
            x_weight = tl.load(column_weight + column * column_entries + j, mask=column < width, other=0.0)
            there = (y >= 0)[:, None] & (x >= 0)[None, :]
            place = (image * h + y[:, None]) * w + x[None, :]
            value = tl.load(patches + place, mask=there, other=0.0).to(tl.float32)
            if SIMILARITY:
                value = tl.where(there, 1 - value, 0.0)
            if MASKED:
                value = tl.where(tl.load(mask + place, mask=there, other=0) != 0, value, 0.0)
            part += value * x_weight[None, :]
        total += part * y_weight[:, None]
    place = (image * height + row[:, None]) * width + column[None, :]
    tl.store(pixels + place, total, mask=(row < height)[:, None] & (column < width)[None, :])


def upsample_blur(map: Tensor, rows: Axis, columns: Axis, pixels: Tensor) -> None:
    """Fill pixels (B, H, W) float32 from a contiguous map (B, h, w)."""
    (map_rows, row_entries), column_entries = (map.shape[1], rows.index.shape[1]), columns.index.shape[1]
    if row_entries * column_entries <= MOST_PAIRS:
        launch(map, None, rows, columns, pixels)
        return
    between = torch.empty(map.shape[0], map_rows, pixels.shape[2], dtype=torch.float32, device=map.device)
    launch(map, None, _unchanged(map_rows, map.device), columns, between)
    launch(between, None, rows, _unchanged(pixels.shape[2], map.device), pixels)


def launch(
    patches: Tensor,
    mask: Tensor | None,
    rows: Axis,
    columns: Axis,
    pixels: Tensor,
    *,
    similarity: bool = False,
) -> None:
    """Fill pixels (B, H, W) float32 from contiguous patches (B, h, w) in one launch.

    Args:
        patches: (B, h, w), float32, bfloat16 or float16.
        mask: (B, h, w), uint8, contiguous: where it is 0 a patch counts as 0. None counts all.
        rows: weights of the rows.
        columns: weights of the columns.
        pixels: (B, H, W), float32, contiguous.
        similarity: whether a patch counts as 1 - its value.
    """
    (b, h, w), (height, width) = patches.shape, pixels.shape[1:]
    if b == 0:
        return
    gather[(triton.cdiv(width, TILE_COLUMNS) * triton.cdiv(height, TILE_ROWS) * b,)](
        patches, patches if mask is None else mask, rows.index, rows.weight, columns.index, columns.weight,
        pixels,
        h, w, height, width, rows.index.shape[1], columns.index.shape[1],
        similarity, mask is not None, TILE_ROWS, TILE_COLUMNS, **OPTIONS,
    )  # fmt: skip


def _unchanged(count: int, device: torch.device) -> Axis:
    return Axis(
        torch.arange(count, dtype=torch.int32, device=device)[:, None], torch.ones(count, 1, device=device)
    )


def variants() -> list[Variant]:
    """List the ways in which the launchers call the kernel."""
    table = {f"{axis}_{kind}": f"*{'i32' if kind == 'index' else 'fp32'}:16"
             for axis in ("row", "column") for kind in ("index", "weight")}  # fmt: skip
    sizes = dict.fromkeys(("h", "w", "height", "width", "row_entries", "column_entries"), "i32")
    signature = table | {"pixels": "*fp32:16"} | sizes
    tile = {"ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS}
    found = []
    for name in DTYPES.values():
        pointers = {"patches": f"*{name}:16", "mask": f"*{name}:16"}
        constants = {"SIMILARITY": 0, "MASKED": 0, **tile}
        found.append(
            Variant(f"upsample_blur.gather {name}", gather, pointers | signature, constants, OPTIONS)
        )
    for masked, label in ((0, "all patches"), (1, "masked")):
        pointers = {"patches": "*fp32:16", "mask": "*u8:16" if masked else "*fp32:16"}
        constants = {"SIMILARITY": 1, "MASKED": masked, **tile}
        found.append(Variant(f"cosine_map.gather {label}", gather, pointers | signature, constants, OPTIONS))
    return found
