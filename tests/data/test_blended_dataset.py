"""Properties of a blend: each dataset has its share of any number of samples."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import (
    BlendedDataset,
    blended_dataset,
    build_bert_datasets,
    build_gpt_datasets,
    sample_map,
)
from megatron.data.blended_dataset import build_blend_map, samples_needed, whole_weights
from megatron.data.build import Splits
from megatron.errors import ConfigError, DataError
from tests.data.support import EXAMPLES, data_config, random_documents, tokenizer, write_dataset

weights_of_blends = st.lists(
    st.floats(1e-12, 1e12) | st.integers(1, 10).map(float), min_size=1, max_size=8
)


def deal(weights: list[float], samples: int, cache: Path) -> list[tuple[int, int]]:
    """Dataset and number of each of the first samples."""
    rows = build_blend_map(whole_weights(weights), samples=samples, cache_dir=cache)
    return [tuple(rows[i].tolist()) for i in range(samples)]


@given(weights=weights_of_blends)
@settings(EXAMPLES, max_examples=60)
def test_each_dataset_has_its_share_of_any_number(tmp_path: Path, weights: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blended_dataset, "FIRST_BLOCK_SAMPLES", 64)
        rows = deal(weights, 500, tmp_path)
    counts = [0] * len(weights)
    total = sum(map(Fraction, weights))
    for n, (dataset, sample) in enumerate(rows, start=1):
        assert sample == counts[dataset], "a dataset's samples come in their own order"
        counts[dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(weight) / total * n) < 1 + 1e-9
    needed = samples_needed(whole_weights(weights), 500)
    assert all(count <= most for count, most in zip(counts, needed, strict=True))


@pytest.mark.parametrize("weights", [[1e-300, 1e300], [5e-324, 1, 1.7e308], [1.0] * 300])
def test_extreme_weights_are_weights(tmp_path: Path, weights: list[float]) -> None:
    rows = deal(weights, 900, tmp_path)
    counts = np.bincount([dataset for dataset, _ in rows], minlength=len(weights))
    assert counts.tolist() == (
        [3] * 300 if len(weights) == 300 else [0] * (len(weights) - 1) + [900]
    )


def test_more_samples_keep_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = deal([0.3, 0.7, 2.5], 5000, tmp_path / "a")
    monkeypatch.setattr(blended_dataset, "FIRST_BLOCK_SAMPLES", 100)
    monkeypatch.setattr(sample_map, "MAX_BLOCK_SAMPLES", 400)
    assert deal([0.3, 0.7, 2.5], 250, tmp_path / "b") == reference[:250]
    assert deal([0.3, 0.7, 2.5], 5000, tmp_path / "b") == reference
    assert len(list((tmp_path / "b").glob("blend_*.npy"))) == 14  # 100, 200, then 400 each


def test_only_proportions_count(tmp_path: Path) -> None:
    assert deal([0.25, 0.75], 100, tmp_path) == deal([1, 3], 100, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 1


# Tokens of dataset a are below 30, those of b from 30 on.
def corpora(directory: Path) -> None:
    random = np.random.default_rng(4)
    for name, low in (("a", 5), ("b", 30)):
        documents = [[random.integers(low, low + 25, 20).tolist()] for _ in range(40)]
        write_dataset(directory / name, documents)
    write_dataset(directory / "tiny", [[[60] * 20]])


def build_gpt(
    directory: Path,
    blend: tuple[str, ...],
    samples: tuple[int, int, int],
    report: list[str] | None = None,
    **changes: Any,
) -> Splits:
    paths = tuple(w if i % 2 == 0 else str(directory / w) for i, w in enumerate(blend))
    flags = {"data_path": paths, "seq_length": 8, **changes}
    lines: list[str] = [] if report is None else report
    return build_gpt_datasets(
        data_config(directory, directory, **flags),
        tokenizer(directory),
        samples,
        report=lines.append,
    )


def test_a_blend_holds_the_samples_of_each_dataset(tmp_path: Path) -> None:
    corpora(tmp_path)
    report: list[str] = []
    blend = build_gpt(tmp_path, ("3", "a", "1", "b"), (400, 40, 8), report, split="8,1,1")
    for name, dataset, samples in zip(("train", "valid", "test"), blend, (400, 40, 8), strict=True):
        assert isinstance(dataset, BlendedDataset) and len(dataset) == samples
        split = ("train", "valid", "test").index(name)
        wanted = tuple(samples if i == split else 0 for i in range(3))
        one = build_gpt(tmp_path, ("1", "a"), wanted, split="8,1,1")[split]  # type: ignore[arg-type]
        two = build_gpt(tmp_path, ("1", "b"), wanted, split="8,1,1")[split]  # type: ignore[arg-type]
        assert one is not None and two is not None
        counts = [0, 0]
        for i in range(samples):
            tokens = dataset[i]["tokens"]
            number = int(tokens[0] >= 30)
            own = (one, two)[number][counts[number]]["tokens"]
            np.testing.assert_array_equal(tokens, own)
            counts[number] += 1
            assert abs(counts[0] - 0.75 * (i + 1)) < 1
        with pytest.raises(IndexError):
            dataset[samples]
    assert len(report) == 6
    assert report[0].startswith(f"train, 0.75 of {tmp_path / 'a'}: 32 documents, 80 samples an")
    assert report[1].startswith(f"train, 0.25 of {tmp_path / 'b'}: 32 documents")


def test_a_dataset_too_small_for_evaluation_is_left_out(tmp_path: Path) -> None:
    corpora(tmp_path)
    report: list[str] = []
    blend = ("2", "a", "4", "tiny", "2", "b")
    train, valid, test = build_gpt(tmp_path, blend, (40, 40, 0), report, split="9,1")
    assert train is not None and test is None
    assert {int(train[i]["tokens"][0]) for i in range(40)} > {60}
    assert isinstance(valid, BlendedDataset)
    firsts = [valid[i]["tokens"][0] for i in range(40)]
    assert sum(first < 30 for first in firsts) == 20, "the others' shares grow alike"
    assert 60 not in firsts
    assert [line.split(":")[0].split(" of ")[0] for line in report] == [
        *["train, 0.25", "train, 0.5", "train, 0.25"],
        *["valid, 0.5", "valid, 0.5", "valid, 0.5"],
    ]
    assert (
        f"tiny: skipped, since --split '9,1' leaves no document for valid: {tmp_path}" in report[3]
    )
    report.clear()
    valid = build_gpt(tmp_path, ("1", "tiny", "1", "a"), (0, 10, 0), report, split="9,1")[1]
    assert valid is not None and not isinstance(valid, BlendedDataset)
    assert build_gpt(tmp_path, ("1", "tiny", "1", "tiny"), (0, 9, 9), split="9,1")[1:] == (
        None,
        None,
    )


def test_a_dataset_too_small_for_training_is_an_error(tmp_path: Path) -> None:
    corpora(tmp_path)
    with pytest.raises(DataError, match="tiny: 1 documents for train hold no sample: 20 tokens"):
        build_gpt(tmp_path, ("1", "a", "1e-9", "tiny"), (10, 0, 0), split="1", seq_length=20)


def test_mistakes_in_a_blend_are_named(tmp_path: Path) -> None:
    corpora(tmp_path)
    with pytest.raises(ConfigError, match="found 3 values"):
        build_gpt(tmp_path, ("1", "a", "2"), (1, 0, 0))
    with pytest.raises(ConfigError, match="expects a positive weight before .*b, found '0'"):
        build_gpt(tmp_path, ("1", "a", "0", "b"), (1, 0, 0))
    with pytest.raises(DataError, match="nowhere.idx: cannot open"):
        build_gpt(tmp_path, ("1", "a", "1", "nowhere"), (1, 0, 0))


def test_samples_of_other_models_are_blended_too(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_dataset(tmp_path / name, random_documents(20, seed))
    paths = tuple(str(tmp_path / name) for name in ("a", "b"))

    def build(*data_path: str) -> Any:
        config = data_config(tmp_path, tmp_path, data_path=data_path, split="1")
        return build_bert_datasets(config, tokenizer(tmp_path), (90, 0, 0), report=lambda _: None)[
            0
        ]

    blend, one, two = build("1", paths[0], "2", paths[1]), build(paths[0]), build(paths[1])
    rows = deal([1, 2], 90, tmp_path / "rows")
    assert sorted({dataset for dataset, _ in rows}) == [0, 1]
    for i, (dataset, sample) in enumerate(rows):
        for key, value in (one, two)[dataset][sample].items():
            np.testing.assert_array_equal(blend[i][key], value)
