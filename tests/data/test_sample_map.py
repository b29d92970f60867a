"""Properties of the sample map: one order, whatever is asked for and whoever builds."""

import multiprocessing
import pickle
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron.data import IndexedDataset
from megatron.data import sample_map as sample_map_module
from megatron.data.sample_map import SampleMap, build_sentence_map
from megatron.errors import DataError
from tests.data.support import random_documents, write_dataset

RULE: dict[str, Any] = {
    "max_tokens": 40,
    "min_sentences": 2,
    "short_seq_prob": 0.1,
    "seed": 1234,
}


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    return write_dataset(tmp_path / "d", random_documents(30, seed=1))


def build(dataset: IndexedDataset, cache: Path, samples: int, **changes: Any) -> SampleMap:
    arguments = {"documents": range(30), **RULE, **changes}
    return build_sentence_map(dataset, samples=samples, cache_dir=cache, **arguments)[0]


def rows(sample_map: SampleMap, count: int) -> list[list[int]]:
    return [sample_map[i].tolist() for i in range(count)]


def test_more_samples_are_appended(dataset: IndexedDataset, tmp_path: Path) -> None:
    few = build(dataset, tmp_path / "few", 10)
    many = build(dataset, tmp_path / "many", 40 * len(few))
    assert len(many) >= 40 * len(few)
    assert rows(many, len(few)) == rows(few, len(few))
    assert rows(many, 4 * len(few)) == rows(
        build(dataset, tmp_path / "x", 4 * len(few)), 4 * len(few)
    )


def test_files_grow_with_the_logarithm_of_the_epochs(
    dataset: IndexedDataset, tmp_path: Path
) -> None:
    few = build(dataset, tmp_path / "c", 1)
    build(dataset, tmp_path / "c", 1000 * len(few))
    assert len(list((tmp_path / "c").glob("*.npy"))) == 10  # 1 + 2 + ... + 512 epochs


def test_large_blocks_do_not_grow(
    dataset: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = len(build(dataset, tmp_path / "a", 1))
    reference = rows(build(dataset, tmp_path / "a", 8 * epoch), 8 * epoch)
    monkeypatch.setattr(sample_map_module, "MAX_BLOCK_SAMPLES", 2 * epoch)
    smaller = build(dataset, tmp_path / "b", 8 * epoch)
    assert rows(smaller, 8 * epoch) == reference
    assert len(list((tmp_path / "b").glob("*.npy"))) > len(list((tmp_path / "a").glob("*.npy")))


def test_an_index_that_exists_is_used(dataset: IndexedDataset, tmp_path: Path) -> None:
    build(dataset, tmp_path / "c", 50)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.npy")}
    build(dataset, tmp_path / "c", 50)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.npy")} == before


@pytest.mark.parametrize(
    "change",
    [
        {"documents": range(29)},
        {"documents": range(1, 30)},
        {"max_tokens": 39},
        {"min_sentences": 1},
        {"short_seq_prob": 0.2},
        {"seed": 1235},
    ],
)
def test_another_rule_has_another_file(
    dataset: IndexedDataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    build(dataset, tmp_path / "c", 1)
    build(dataset, tmp_path / "c", 1, **change)
    assert len(list((tmp_path / "c").glob("*.npy"))) == 2


def test_another_dataset_under_the_same_name_has_another_file(
    dataset: IndexedDataset, tmp_path: Path
) -> None:
    first = rows(build(dataset, tmp_path / "c", 1), 5)
    other = write_dataset(tmp_path / "d", random_documents(30, seed=2))
    assert rows(build(other, tmp_path / "c", 1), 5) != first
    assert len(list((tmp_path / "c").glob("*.npy"))) == 2


def test_a_moved_dataset_keeps_its_files(dataset: IndexedDataset, tmp_path: Path) -> None:
    build(dataset, tmp_path / "c", 1)
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".idx", ".bin"):
        (tmp_path / "d").with_suffix(suffix).rename(tmp_path / "elsewhere" / f"d{suffix}")
    build(IndexedDataset(tmp_path / "elsewhere" / "d"), tmp_path / "c", 1)
    assert len(list((tmp_path / "c").glob("*.npy"))) == 1


def test_no_sample_is_no_endless_search(tmp_path: Path) -> None:
    single = write_dataset(tmp_path / "d", random_documents(30, seed=1, sentences=(1, 2)))
    assert len(build(single, tmp_path / "c", 100)) == 0


def test_negative_and_large_numbers_are_refused(dataset: IndexedDataset, tmp_path: Path) -> None:
    sample_map = build(dataset, tmp_path / "c", 10)
    for index in (-1, len(sample_map)):
        with pytest.raises(IndexError):
            sample_map[index]


@pytest.mark.parametrize("length", [0, 10, 100, 200])
def test_a_damaged_index_is_named(dataset: IndexedDataset, tmp_path: Path, length: int) -> None:
    build(dataset, tmp_path / "c", 1)
    (path,) = (tmp_path / "c").glob("*.npy")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{path.name}: damaged, delete it"):
        build(dataset, tmp_path / "c", 1)


def test_an_index_of_objects_is_refused(dataset: IndexedDataset, tmp_path: Path) -> None:
    build(dataset, tmp_path / "c", 1)
    (path,) = (tmp_path / "c").glob("*.npy")
    np.save(path, np.array([{"pickled": True}], object), allow_pickle=True)
    with pytest.raises(DataError, match="damaged"):
        build(dataset, tmp_path / "c", 1)


def test_a_copy_in_another_process_maps_the_files(dataset: IndexedDataset, tmp_path: Path) -> None:
    sample_map = build(dataset, tmp_path / "c", 5000)
    pickled = pickle.dumps(sample_map)
    assert len(pickled) < 5000
    assert rows(pickle.loads(pickled), 300) == rows(sample_map, 300)


def _race(
    prefix: Path,
    cache: Path,
    start: Barrier,
    results: "multiprocessing.Queue[npt.NDArray[np.int64]]",
) -> None:
    dataset = IndexedDataset(prefix)
    start.wait()
    results.put(np.array(rows(build(dataset, cache, 3000), 3000)))


def test_racing_ranks_see_one_map(dataset: IndexedDataset, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    arguments = (tmp_path / "d", tmp_path / "c", start, results)
    racers = [context.Process(target=_race, args=arguments) for _ in range(4)]
    for racer in racers:
        racer.start()
    seen = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    alone = np.array(rows(build(dataset, tmp_path / "alone", 3000), 3000))
    assert all(np.array_equal(part, alone) for part in seen)
    assert not list((tmp_path / "c").glob(".*.part"))
