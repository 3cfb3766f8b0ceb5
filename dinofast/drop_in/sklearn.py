"""scikit-learn's nearest neighbors, k-means and Dirichlet-process mixture on dinofast's operators.

Estimators in every respect: parameters, attributes, cloning, pipelines and pickling are scikit-learn's.
NumPy, torch and CuPy arrays go in, and results are of the kind that came in. float32 rows run on the kernels;
float64 rows, NumPy's default, are computed in float64 by the plain references, so give float32 where speed
counts. Sparse matrices are refused.
"""

from __future__ import annotations

from dinofast.errors import InputError

try:
    from dinofast.drop_in.sklearn_kmeans import KMeans
    from dinofast.drop_in.sklearn_mixture import BayesianGaussianMixture
    from dinofast.drop_in.sklearn_neighbors import NearestNeighbors
except ImportError as error:
    raise InputError(
        f"dinofast.drop_in.sklearn builds on scikit-learn 1.6 or newer ({error}); pip install scikit-learn"
    ) from error

__all__ = ["BayesianGaussianMixture", "KMeans", "NearestNeighbors"]
