"""flash-kmeans: `batch_kmeans_Euclid` by another import; on a CPU its plain torch function is the host."""

from __future__ import annotations

from typing import Any

import torch
from side_by_side import compare, need

need("pip install flash-kmeans", "flash_kmeans")

from flash_kmeans import batch_kmeans_Euclid as host  # noqa: E402

from dinofast.drop_in.flash_kmeans import batch_kmeans_Euclid  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    from flash_kmeans.torch_fallback import batch_kmeans_Euclid_torch_native as host

B, N, D, K = 4, 4096, 128, 32
generator = torch.Generator().manual_seed(0)
directions = 4 * torch.randn(B, K, D, generator=generator)
rows = directions.repeat(1, N // K, 1) + torch.randn(B, N, D, generator=generator)
rows, start = rows.to(device), directions.to(device)


def clustered(function: Any) -> list[Any]:
    """Give every row's cluster, and the centers after five iterations."""
    ids, centers, _ = function(rows, K, max_iters=5, init_centroids=start)
    return [ids.cpu(), centers.cpu()]


compare(
    f"batch_kmeans_Euclid: {K} clusters of {N} rows of {D} channels, {B} at a time, five iterations",
    lambda: clustered(host),
    lambda: clustered(batch_kmeans_Euclid),
)
