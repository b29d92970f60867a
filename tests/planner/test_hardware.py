"""Descriptions of hardware are read whole, or every mistake in them is told at once."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.errors import ConfigError
from megatron.planner.hardware import DIRECTORY, Hardware, load_hardware, names


def file_with(folder: Path, **changes: Any) -> Path:
    """The file of the A100 with other values; a key whose value is None is left out."""
    values = yaml.safe_load((DIRECTORY / "a100-80gb.yaml").read_text(encoding="utf-8"))
    values |= changes
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def test_the_known_hardware_is_known_by_its_name() -> None:
    assert names() == ("a100-80gb", "h100-sxm", "v100-32gb")
    for name in names():
        hardware = load_hardware(name)
        assert hardware.name == name
        assert 0 < hardware.reserved < hardware.memory < hardware.memory_gib * 1.001 * 2**30


@pytest.mark.parametrize("name", names())
def test_no_share_is_more_than_the_whole(name: str) -> None:
    """But for an all-reduce that the switches compute."""
    hardware = load_hardware(name)
    shares = [hardware.matmul.reached, hardware.bandwidth_reached]
    shares += [hardware.attention.forward, hardware.attention.backward]
    for link in (hardware.nvlink, hardware.network):
        reached = link.reached
        shares += [reached.all_gather, reached.reduce_scatter, reached.broadcast, reached.message]
    shares += [speed for *_, speed in hardware.matmul.tiles]
    assert all(0 < share <= 1 for share in shares)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = file_with(tmp_path, name="mine", processors=100)
    found, known = load_hardware(str(path)), load_hardware("a100-80gb")
    different = {
        f.name for f in fields(Hardware) if getattr(found, f.name) != getattr(known, f.name)
    }
    assert different == {"name", "processors"}
    assert is_dataclass(found.nvlink)


def test_peak_rates_by_number_format() -> None:
    hardware = load_hardware("h100-sxm")
    assert hardware.peak_flops("bfloat16") == pytest.approx(989.4e12)
    assert hardware.peak_flops("float8_e4m3fn") == hardware.peak_flops("float8_e5m2")
    with pytest.raises(ConfigError, match="v100-32gb has no rate for bfloat16, only for float16"):
        load_hardware("v100-32gb").peak_flops("bfloat16")


def test_a_name_that_is_neither_known_nor_a_file() -> None:
    with pytest.raises(ConfigError, match="b200 is none of a100-80gb, h100-sxm, v100-32gb"):
        load_hardware("b200")


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not YAML"):
        load_hardware(str(path))
    path.write_text("just words", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected keys with values, found 'just words'"):
        load_hardware(str(path))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        processors="many",
        bandwidth_gb=-1,
        gpus_per_node=2.5,
        issue_us=None,
        peak_tflops={"bfloat16": "fast"},
        matmul={"reached": 0.8, "tiles": [[128, 128]]},
        network=5,
        watts=700,
    )
    with pytest.raises(ConfigError) as caught:
        load_hardware(str(path))
    problems = [p.removeprefix(f"--hardware {path}: ") for p in caught.value.problems]
    assert sorted(p.partition(", expected name")[0] for p in problems) == [
        "bandwidth_gb: expected a number above 0, found -1",
        "gpus_per_node: expected a whole number above 0, found 2.5",
        "issue_us: missing",
        "matmul.start_k: missing",
        "matmul.tiles: expected a list of [rows, columns, speed], found [[128, 128]]",
        "network: expected keys with values, found 5",
        "peak_tflops: expected names with numbers above 0, found {'bfloat16': 'fast'}",
        "processors: expected a whole number above 0, found 'many'",
        "watts: unknown",
    ]
