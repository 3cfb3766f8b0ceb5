"""Names of patchcore-inspection, its nearest-neighbor method, scorer and samplers, on dinofast's operators.

Scores are the host's: the mean of the k squared Euclidean distances. The samplers' random choices follow
torch's global generator, as the host's follow the libraries' own: call `torch.manual_seed` before, or give a
seed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinofast.drop_in import faiss
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor
from dinofast.models.coreset import k_center

INDEX_FILE = "nnscorer_search_index.faiss"


@on_callers_stream
class FaissNN:
    """Exact search, as the host's nn_method.

    Args:
        on_gpu: kept; rows are searched where the queries are.
        num_workers: threads.
    """

    def __init__(self, on_gpu: bool = False, num_workers: int = 4) -> None:
        faiss.omp_set_num_threads(num_workers)
        self.on_gpu = on_gpu
        self.search_index: Any = None

    def fit(self, features: Any) -> None:
        """Take over the rows (M, D) to search in; earlier ones are dropped."""
        rows = to_tensor(features, "features")
        self.reset_index()
        self.search_index = faiss.IndexFlatL2(int(rows.shape[-1]))
        self.search_index.add(features)

    def run(
        self, n_nearest_neighbours: int, query_features: Any, index_features: Any = None
    ) -> tuple[Any, Any]:
        """Search the fitted rows, or `index_features` (M, D) when they are given.

        Args:
            n_nearest_neighbours: k.
            query_features: (Q, D).
            index_features: rows for this call only, or None.

        Returns:
            Squared distances (Q, k) and row numbers (Q, k).

        Raises:
            InputError: nothing to search in, or another D.
        """
        if index_features is not None:
            return faiss.knn(query_features, index_features, n_nearest_neighbours)
        if self.search_index is None:
            raise InputError("this nearest-neighbor method has no rows; call fit first")
        found: tuple[Any, Any] = self.search_index.search(query_features, n_nearest_neighbours)
        return found

    def reset_index(self) -> None:
        """Drop the rows."""
        self.search_index = None

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the rows as faiss writes an index.

        Raises:
            InputError: nothing to write, or the file cannot be written.
        """
        if self.search_index is None:
            raise InputError("this nearest-neighbor method has no rows to save; call fit first")
        faiss.write_index(self.search_index, filename)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Read rows that this or faiss wrote.

        Raises:
            InputError: no such file, torn, or no flat index.
        """
        self.search_index = faiss.read_index(filename)


@on_callers_stream
class NearestNeighbourScorer:
    """Anomaly scores from the distances to the nearest rows.

    Args:
        n_nearest_neighbours: k.
        nn_method: what searches; a `FaissNN` of its own by default.
    """

    def __init__(self, n_nearest_neighbours: int, nn_method: FaissNN | None = None) -> None:
        self.n_nearest_neighbours = n_nearest_neighbours
        self.nn_method = FaissNN(False, 4) if nn_method is None else nn_method
        self.detection_features: NDArray[Any] | None = None

    def fit(self, detection_features: Sequence[Any]) -> None:
        """Take over features (M, ...) of one or several layers; they are joined along the channels.

        Raises:
            InputError: no layers, no rows, or layers of different numbers of rows.
        """
        self.detection_features = _joined(detection_features)
        self.nn_method.fit(self.detection_features)

    def predict(self, query_features: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Score queries (Q, ...) of as many layers.

        Returns:
            Mean squared distance to the k nearest rows (Q,), these distances (Q, k), their numbers (Q, k).

        Raises:
            InputError: no layers, no rows, or layers of different numbers of rows; see `FaissNN.run`.
        """
        distances, numbers = self.nn_method.run(self.n_nearest_neighbours, _joined(query_features))
        return distances.mean(axis=-1), distances, numbers

    def save(
        self, save_folder: str | os.PathLike[str], save_features_separately: bool = False, prepend: str = ""
    ) -> None:
        """Write the index into a folder.

        Raises:
            InputError: features apart are asked for, which are in the index already, or it cannot be written.
        """
        if save_features_separately:
            raise InputError(
                "features are saved in the index; read them back with reconstruct_n instead of a pickle"
            )
        self.nn_method.save(Path(save_folder) / f"{prepend}{INDEX_FILE}")

    def load(self, load_folder: str | os.PathLike[str], prepend: str = "") -> None:
        """Read an index that this or the host wrote.

        Raises:
            InputError: see `FaissNN.load`.
        """
        self.nn_method.load(Path(load_folder) / f"{prepend}{INDEX_FILE}")


class IdentitySampler:
    """Keep every row."""

    def run(self, features: Any) -> Any:
        """Give the rows as they are."""
        return features


class _Sampler:
    def __init__(self, percentage: float, seed: int | None = None) -> None:
        if not 0 < percentage < 1:
            raise InputError(f"percentage must be between 0 and 1, both excluded, got {percentage}")
        self.percentage, self.seed = percentage, seed

    def _drawn(self) -> int:
        """Give the seed, or one from torch's global generator."""
        return int(torch.randint(1 << 62, ()).item()) if self.seed is None else self.seed


@on_callers_stream
class RandomSampler(_Sampler):
    """Keep a random share of the rows.

    Args:
        percentage: the share, in (0, 1).
        seed: of the choice; None draws one from torch's global generator.
    """

    def run(self, features: Any) -> Any:
        """Give ⌊share · N⌋ of the rows (N, D), of the kind that came in."""
        rows = to_tensor(features, "features")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._drawn()))
        return like(rows[order[: int(len(rows) * self.percentage)].to(rows.device)], features)


@on_callers_stream
class GreedyCoresetSampler(_Sampler):
    """Keep a share of the rows, each time the one farthest from those kept.

    Args:
        percentage: the share, in (0, 1).
        device: where to select; the rows stay where they are.
        dimension_to_project_features_to: 128, or D or None to measure in the rows' own channels.
        seed: of projection and start; None draws one from torch's global generator.
    """

    start = "distance-norm"

    def __init__(
        self,
        percentage: float,
        device: str | torch.device = "cpu",
        dimension_to_project_features_to: int | None = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(percentage, seed)
        self.device, self.dimension_to_project_features_to = device, dimension_to_project_features_to

    def run(self, features: Any) -> Any:
        """Give ⌊share · N⌋ of the rows (N, D), of the kind that came in, in the order of selection.

        Raises:
            InputError: a share that selects none, NaN rows, or a dimension that is not offered.
        """
        rows, channels = to_tensor(features, "features"), self.dimension_to_project_features_to
        if channels not in (None, 128, rows.shape[1]):
            raise InputError(f"dimension_to_project_features_to must be 128, D or None, got {channels}")
        index = k_center(
            rows.to(self.device),
            ratio=self.percentage,
            start=self.start,
            projection="linear-128" if channels == 128 else None,
            seed=self._drawn(),
        )
        return like(rows[index.to(rows.device)], features)


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """`GreedyCoresetSampler` that begins with the mean distance to ten random rows.

    Args:
        percentage: the share, in (0, 1).
        device: where to select.
        number_of_starting_points: 10; others are not offered.
        dimension_to_project_features_to: 128, or D or None to measure in the rows' own channels.
        seed: of projection and start; None draws one from torch's global generator.
    """

    start = "mean-of-10"

    def __init__(
        self,
        percentage: float,
        device: str | torch.device = "cpu",
        number_of_starting_points: int = 10,
        dimension_to_project_features_to: int | None = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__(percentage, device, dimension_to_project_features_to, seed)
        if number_of_starting_points != 10:
            raise InputError(f"number_of_starting_points must be 10, got {number_of_starting_points}")
        self.number_of_starting_points = number_of_starting_points


def _joined(features: Sequence[Any]) -> NDArray[np.float32]:
    """Join layers (N, ...) along their channels.

    Raises:
        InputError: no layers, no rows, or layers of different numbers of rows.
    """
    parts = [to_tensor(part, "features").detach().cpu() for part in features]
    if not parts:
        raise InputError("features must be a list with one array a layer, got none")
    shapes = [tuple(part.shape) for part in parts]
    if any(shape[:1] in ((), (0,)) or shape[0] != shapes[0][0] for shape in shapes):
        raise InputError(f"features must have the same rows in every layer, at least 1, got {shapes}")
    joined: NDArray[np.float32] = (
        torch.cat([part.reshape(len(part), -1) for part in parts], 1).float().numpy()
    )
    return joined
