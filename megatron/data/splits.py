"""Which documents go to training, validation and test."""

from megatron.errors import ConfigError

NAMES = ("train", "valid", "test")


def split_documents(split: str, documents: int) -> tuple[range, range, range]:
    """Three ranges of documents, one behind the other, whose lengths go by the weights of --split.

    "969, 30, 1" gives 96.9 %, 3 % and 0.1 %; weights left out are 0, "/" separates as "," does.
    Raises ConfigError on anything but one to three weights of which one is above 0.
    """
    try:
        weights = [float(weight) for weight in split.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if (
        not 1 <= len(weights) <= 3
        or not all(0 <= w < float("inf") for w in weights)
        or not any(weights)
    ):
        raise ConfigError(f"--split {split!r}: expected up to three weights such as 969,30,1")
    weights += [0.0] * (3 - len(weights))
    ends = [round(sum(weights[: i + 1]) / sum(weights) * documents) for i in range(3)]
    starts = [0, *ends[:2]]
    train, valid, test = (range(a, b) for a, b in zip(starts, ends, strict=True))
    return train, valid, test
