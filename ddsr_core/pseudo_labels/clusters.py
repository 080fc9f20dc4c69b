"""Stage 3, clusters: k-means on the embeddings gives every patch a pseudo-label (paper, II-A).

Pseudo-labels are numbered by cluster size, largest first (ties: the cluster whose first patch comes first), so that the
number of a cluster does not depend on k-means' own numbering.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError
from ddsr_core.storage.store import Stage, StageResult, write_atomically, write_json
from ddsr_core.storage.vector_table import content_digest, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

#: Above so many patches mini-batch k-means is used: within 1.3% of the inertia at a sixth of the time.
MINI_BATCH_ABOVE = 500_000
SILHOUETTE_SAMPLE = 2_000


class ClustersConfig(StageConfig):
    """How the pseudo-classes are found."""

    k: int = Field(7, ge=2, le=1000, description="number of pseudo-labels")
    seed: int = Field(42, ge=0, lt=2**32, description="of the k-means initialization")
    n_init: int = Field(10, ge=1, le=100, description="k-means restarts; the best is kept")
    max_iterations: int = Field(300, ge=1, le=10_000, description="k-means iterations of a restart, at most")
    spherical: bool = Field(
        False, description="scale vectors to length 1 first; changes nothing where embeddings.normalize did"
    )


@dataclass(frozen=True)
class Clustering:
    """What k-means found. Distances are Euclidean, in the space that was clustered.

    Attributes:
        centroids: ``float32 (k, d)``, row = pseudo-label.
        labels: pseudo-labels ``int32 (N,)``, 0 … k-1, all of them present.
        distances: ``float32 (N,)`` from each vector to its centroid.
        inertia: sum of the squared distances.
    """

    centroids: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    inertia: float


def run(config: ClustersConfig, *, embeddings: Path, out: Path, runtime: Runtime) -> StageResult:
    """Cluster the embeddings (layout: ``docs/artifacts.md``). The vectors in the table stay as they were embedded.

    Raises:
        InputError: fewer patches, or fewer different ones, than clusters.
    """
    import pyarrow as pa

    columns, stored = read_table(embeddings)
    vectors = unit_length(stored) if config.spherical else stored
    with runtime.progress(f"Clustering {len(vectors)} patches", total=1, unit="runs") as bar:
        found = cluster(vectors, config)
        summary = _summary(config, columns, vectors, found)
        bar.advance()
    _write_labels(out, columns["patch_id"], found)
    _write_array(out / "centroids.npy", found.centroids)
    write_table(out, [(columns.append_column("pseudo_label", pa.array(found.labels)), stored)])
    write_json(out / "summary.json", summary)
    ids_and_labels = [f"{name} {label}" for name, label in zip(columns["patch_id"].to_pylist(), found.labels, strict=True)]
    counts = {name: summary[name] for name in ("k", "sizes", "silhouette")}
    return StageResult(counts, digest=content_digest(ids_and_labels, [found.centroids, stored]))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of ``(N, d)`` to length 1.

    Raises:
        InputError: a row is zero.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            "a zero vector has no place on the sphere", where="clusters.spherical", fix="set clusters.spherical=false"
        )
    return np.asarray(vectors / lengths, dtype=np.float32)


def cluster(vectors: np.ndarray, config: ClustersConfig) -> Clustering:
    """k-means on ``float32 (N, d)``; the same numbers whatever the number of threads.

    Raises:
        InputError: fewer vectors, or fewer different ones, than clusters.
    """
    import warnings

    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(vectors) < config.k:
        raise _too_few(f"{len(vectors)} patches", config.k)
    kind = KMeans if len(vectors) <= MINI_BATCH_ABOVE else MiniBatchKMeans
    kmeans = kind(config.k, n_init=config.n_init, max_iter=config.max_iterations, random_state=config.seed)
    # Threads add up partial sums in the order in which they finish; one thread always gives the same bits.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said when vectors coincide; we look ourselves
        found = kmeans.fit_predict(vectors)
    names, first, labels, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    if len(names) < config.k:
        raise _too_few(f"{len(vectors)} patches, of which {len(np.unique(vectors, axis=0))} differ,", config.k)
    order = np.lexsort((first, -sizes))
    labels = np.argsort(order)[labels].astype(np.int32)
    centroids = kmeans.cluster_centers_[order].astype(np.float32)
    return Clustering(centroids, labels, _distances(vectors, centroids, labels), float(kmeans.inertia_))


def _too_few(what: str, k: int) -> InputError:
    return InputError(
        f"{what} cannot make {k} clusters",
        where="clusters.k",
        fix="lower clusters.k, accept more patches (patches.quantile or patches.threshold_db), or bring more photos",
    )


def _distances(vectors: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``float32 (N,)``, computed cluster by cluster: one copy of a cluster's vectors at a time."""
    distances = np.empty(len(vectors), np.float32)
    for label, centroid in enumerate(centroids):
        members = labels == label
        distances[members] = np.linalg.norm(vectors[members] - centroid, axis=1)
    return distances


def _summary(config: ClustersConfig, columns: pa.Table, vectors: np.ndarray, found: Clustering) -> dict[str, Any]:
    ids = columns["patch_id"]
    return {
        "k": config.k,
        "sizes": np.bincount(found.labels, minlength=config.k).tolist(),
        "medoids": [ids[index].as_py() for index in medoids(found)],
        "inertia": round(found.inertia, 4),
        "silhouette": silhouette(vectors, found.labels, config.seed),
    }


def medoids(found: Clustering) -> list[int]:
    """For each pseudo-label the row of the vector nearest its centroid."""
    order = np.lexsort((found.distances, found.labels))
    return [int(order[start]) for start in np.searchsorted(found.labels[order], np.arange(len(found.centroids)))]


def silhouette(vectors: np.ndarray, labels: np.ndarray, seed: int, sample: int = SILHOUETTE_SAMPLE) -> float | None:
    """Mean silhouette, -1 … 1, of at most ``sample`` vectors; None where every cluster has a single one."""
    from sklearn.metrics import silhouette_score
    from threadpoolctl import threadpool_limits

    chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:sample])
    if not 2 <= len(np.unique(labels[chosen])) < len(chosen):
        return None
    with threadpool_limits(1):
        return round(float(silhouette_score(vectors[chosen], labels[chosen])), 4)


def _write_labels(out: Path, ids: pa.ChunkedArray, found: Clustering) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"patch_id": ids, "pseudo_label": found.labels, "distance": found.distances})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(out / "labels.parquet", buffer.getvalue())


def _write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())


def read_labels(clusters: Path) -> dict[str, int]:
    """Pseudo-label of every patch id, in the order of the patches."""
    import pyarrow.parquet as pq

    table = pq.read_table(clusters / "labels.parquet", columns=["patch_id", "pseudo_label"])
    return dict(zip(table["patch_id"].to_pylist(), table["pseudo_label"].to_pylist(), strict=True))


STAGE = Stage("clusters", version=1, run=run, config=ClustersConfig, section="II-A")
