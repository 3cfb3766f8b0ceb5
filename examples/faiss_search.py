"""faiss's flat indexes: change the import, keep the calls."""

from __future__ import annotations

from typing import Any

import numpy as np
from side_by_side import compare, need

need("pip install faiss-cpu", "faiss")

import faiss  # noqa: E402

from dinofast.drop_in import faiss as dinofast_faiss  # noqa: E402

draw = np.random.default_rng(0)
rows = draw.standard_normal((20_000, 384), dtype=np.float32)
queries = draw.standard_normal((512, 384), dtype=np.float32)


def index(library: Any, name: str) -> Any:
    """Build a flat index: not timed."""
    built = getattr(library, name)(rows.shape[1])
    built.add(rows)
    return built


for name in ("IndexFlatL2", "IndexFlatIP"):
    host, ours = index(faiss, name), index(dinofast_faiss, name)
    assert np.array_equal(host.search(queries, 3)[1], ours.search(queries, 3)[1]), "other neighbors"
    compare(
        f"{name}.search: 512 queries, 20 000 rows of 384 channels, k = 3",
        lambda host=host: host.search(queries, 3)[:1],
        lambda ours=ours: ours.search(queries, 3)[:1],
    )
