"""Clusters: hand-made blobs, the numbering of the labels, determinism, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.pseudo_labels import clusters
from ddsr_core.pseudo_labels.clusters import cluster, medoids, read_labels, run, silhouette, unit_length
from ddsr_core.pseudo_labels.config import ClustersConfig
from ddsr_core.storage.vector_table import read_table, write_table


def blobs(sizes: list[int], d: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Far-apart blobs in shuffled order: vectors float32 (N, d), and the blob of each."""
    random = np.random.default_rng(seed)
    of = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centers = random.permutation(len(sizes))[:, None] * 100 + np.arange(d)
    return (centers[of] + random.normal(size=(len(of), d))).astype(np.float32), of


def write_embeddings(folder: Path, vectors: np.ndarray) -> Path:
    count = len(vectors)
    columns = pa.table(
        {
            "patch_id": [f"p{index:03d}" for index in range(count)],
            "psnr_bic": np.linspace(15, 22, count, dtype=np.float32),
            "photo": ["a.png"] * count,
        }
    )
    write_table(folder, [(columns, vectors)])
    return folder


def test_hand_example() -> None:
    vectors = np.array([[10, 0], [0, 0], [0, 1], [0, 5], [12, 0]], np.float32)
    found = cluster(vectors, ClustersConfig(k=2))
    assert found.labels.tolist() == [1, 0, 0, 0, 1]
    np.testing.assert_allclose(found.centroids, [[0, 2], [11, 0]], atol=1e-5)
    np.testing.assert_allclose(found.distances, [1, 2, 1, 3, 1], atol=1e-5)
    assert found.inertia == pytest.approx(1 + 4 + 1 + 9 + 1)
    assert medoids(found) == [2, 0]


def test_labels_are_numbers_by_size_also_from_ten_on() -> None:
    sizes = [3, 30, 7, 11, 19, 23, 5, 27, 13, 15, 9, 21]
    vectors, of = blobs(sizes)
    found = cluster(vectors, ClustersConfig(k=12))
    rank = np.argsort(np.argsort([-size for size in sizes]))
    np.testing.assert_array_equal(found.labels, rank[of])
    assert found.labels.dtype == np.int32
    for label, centroid in enumerate(found.centroids):
        expected = vectors[found.labels == label].mean(0)
        np.testing.assert_allclose(centroid, expected, atol=1e-3)  # scikit-learn moves the mean to 0 meanwhile


@pytest.mark.parametrize("seed", range(5))
def test_of_equal_clusters_the_one_met_first_comes_first(seed: int) -> None:
    vectors, of = blobs([4, 4, 4], seed=seed)
    labels = cluster(vectors, ClustersConfig(k=3, seed=seed)).labels
    first_met = list(dict.fromkeys(of.tolist()))
    assert labels.tolist() == [first_met.index(blob) for blob in of]


def test_the_number_of_threads_changes_nothing() -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(cluster(vectors, ClustersConfig(n_init=2)))
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    np.testing.assert_array_equal(found[0].labels, found[1].labels)


def test_many_vectors_go_through_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MINI_BATCH_ABOVE", 10)
    vectors, of = blobs([50, 30, 20])
    assert cluster(vectors, ClustersConfig(k=3)).labels.tolist() == of.tolist()


def test_fewer_patches_than_clusters() -> None:
    with pytest.raises(InputError, match="5 patches cannot make 7 clusters"):
        cluster(np.eye(5, dtype=np.float32), ClustersConfig(k=7))


def test_fewer_different_patches_than_clusters() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    with pytest.raises(InputError, match="12 patches, of which 3 differ, cannot make 4 clusters"):
        cluster(vectors, ClustersConfig(k=4))


def test_spherical_looks_at_directions_only(tmp_path: Path) -> None:
    vectors = np.array([[1, 0.1], [0.1, 1], [50, 1], [1, 50], [2, 0]], np.float32)
    source = write_embeddings(tmp_path / "embeddings", vectors)
    for spherical, expected in ((True, [0, 1, 0, 1, 0]), (False, [0, 0, 1, 0, 0])):
        out = tmp_path / str(spherical)
        run(ClustersConfig(k=2, spherical=spherical), embeddings=source, out=out, runtime=Runtime())
        if spherical:
            assert list(read_labels(out).values()) == expected
        else:
            assert list(read_labels(out).values()) != [0, 1, 0, 1, 0]
        np.testing.assert_array_equal(read_table(out)[1], vectors)


def test_a_zero_vector_has_no_direction() -> None:
    with pytest.raises(InputError, match="zero vector"):
        unit_length(np.array([[1, 0], [0, 0]], np.float32))


def test_silhouette_is_that_of_scikit_learn() -> None:
    vectors, of = blobs([9, 8, 7])
    assert silhouette(vectors, of, seed=0) == round(float(silhouette_score(vectors, of)), 4)
    sampled = silhouette(vectors, of, seed=0, sample=12)
    assert sampled is not None
    assert sampled == silhouette(vectors, of, seed=0, sample=12) > 0.9


def test_silhouette_of_single_members_is_none() -> None:
    assert silhouette(np.eye(3), np.arange(3), seed=0) is None


def test_the_files(tmp_path: Path) -> None:
    vectors, of = blobs([6, 4, 2])
    source = write_embeddings(tmp_path / "embeddings", vectors)
    results = [run(ClustersConfig(k=3), embeddings=source, out=tmp_path / name, runtime=Runtime()) for name in ("a", "b")]
    labels = pq.read_table(tmp_path / "a/labels.parquet")
    assert labels.schema.names == ["patch_id", "pseudo_label", "distance"]
    assert labels.schema.types == [pa.string(), pa.int32(), pa.float32()]
    assert labels["pseudo_label"].to_pylist() == of.tolist()
    columns, stored = read_table(tmp_path / "a")
    assert columns["pseudo_label"].to_pylist() == of.tolist()
    assert columns.schema.field("pseudo_label").type == pa.int32()
    np.testing.assert_array_equal(stored, vectors)
    assert np.load(tmp_path / "a/centroids.npy").shape == (3, 4)
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["sizes"] == [6, 4, 2]
    assert [of[int(name[1:])] for name in summary["medoids"]] == [0, 1, 2]
    assert results[0].digest == results[1].digest
    for name in ("labels.parquet", "centroids.npy", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_digest_follows_the_vectors_that_search_reads(tmp_path: Path) -> None:
    vectors, _ = blobs([6, 4])
    digests = set()
    for scale in (1, 2):
        source = write_embeddings(tmp_path / f"e{scale}", unit_length(vectors) * scale)
        result = run(ClustersConfig(k=2, spherical=True), embeddings=source, out=tmp_path / f"c{scale}", runtime=Runtime())
        digests.add(result.digest)
    assert len(digests) == 2
