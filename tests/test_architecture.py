"""The floors of the house, held against the imports of every file.

    6   the programs: pretrain_*.py, tools/, tasks/, examples/, benchmarks/
    5   planner
    4   training  inference  hf  conversion
    3   model  pipeline  optimizer  checkpoint  data
    2   mpu
    1   ops  tokenizer  monitor, and the modules of megatron/ itself with validation/
    0   config

A file imports from lower floors and from its own folder; `megatron.errors` is for all. No import
goes round in a circle, and none hides inside a function, unless its package is optional. Some files
are arithmetic alone and stay free of torch.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAMS = 6
FLOORS = {
    "planner": 5,
    **dict.fromkeys(["training", "inference", "hf", "conversion"], 4),
    **dict.fromkeys(["model", "pipeline", "optimizer", "checkpoint", "data"], 3),
    "mpu": 2,
    **dict.fromkeys(["ops", "tokenizer", "monitor"], 1),
    "config": 0,
}
WITH_THE_TOP = {"validation"}  # one of the modules of megatron/ itself, in several files
FOR_ALL = {"megatron.__init__", "megatron.errors"}
OPTIONAL = (
    "apex",
    "matplotlib",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "torch.utils.tensorboard",
    "tqdm",
    "transformers",
)
TORCH_FREE = (
    "megatron.arguments",
    "megatron.config.__init__",
    "megatron.errors",
    "megatron.mpu.shard_spec",
    "megatron.mpu.stage",
    "megatron.mpu.topology",
    "megatron.pipeline.schedule",
    "megatron.pipeline.simulator",
    "megatron.planner.drawing",
    "megatron.planner.hardware",
    "megatron.planner.picture",
    "megatron.planner.plan",
    "megatron.planner.report",
    "megatron.planner.timing",
    "megatron.planner.trace",
)


@dataclass(frozen=True)
class Import:
    """One import in one file."""

    importer: str  # dotted name of the importing module
    target: str  # dotted name of what is imported
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer} line {self.line} imports {self.target}"


def imports_of(sources: Mapping[str, str]) -> list[Import]:
    """All imports in the files, given as dotted name -> source."""
    return [
        Import(name, target, node.lineno, inside)
        for name, source in sources.items()
        for node, inside in _import_nodes(ast.parse(source), inside=False)
        for target in _targets(name, node, sources)
    ]


def _import_nodes(
    node: ast.AST, inside: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, inside
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _import_nodes(child, inside)


def _targets(
    importer: str, node: ast.Import | ast.ImportFrom, sources: Mapping[str, str]
) -> Iterator[str]:
    """The modules that a statement imports; `from a import b` may mean the module a.b or a."""
    if isinstance(node, ast.Import):
        yield from (_file(alias.name, sources) or alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        above = importer.split(".")[: -node.level]  # a package is listed by its __init__
        base = ".".join([*above, base] if base else above)
    for alias in node.names:
        yield _file(f"{base}.{alias.name}", sources) or _file(base, sources) or base


def _file(name: str, sources: Mapping[str, str]) -> str | None:
    """The file that a dotted name stands for, a package for its __init__."""
    return next((file for file in (name, f"{name}.__init__") if file in sources), None)


def unit_and_floor(module: str) -> tuple[str, int]:
    """The folder that a module belongs to, and its floor; raises KeyError where there is none."""
    top, *rest = module.split(".")
    if top != "megatron":
        return (top if rest else "programs"), PROGRAMS
    if len(rest) < 2 or rest[0] in WITH_THE_TOP:
        return "megatron", 1
    return rest[0], FLOORS[rest[0]]


def wrong_floors(imports: list[Import]) -> list[str]:
    """The imports that go up, or across to another folder of the same floor."""
    wrong = []
    for each in imports:
        unit, floor = unit_and_floor(each.importer)
        target, target_floor = unit_and_floor(each.target)
        if each.target not in FOR_ALL and unit != target and target_floor >= floor:
            wrong.append(f"{each}: from {unit} on floor {floor} to {target} on {target_floor}")
    return wrong


def circle(imports: list[Import]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        if not each.in_function:
            graph.setdefault(each.importer, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def hidden(imports: list[Import]) -> list[str]:
    """The imports inside functions of packages that are not optional."""
    return [
        str(each)
        for each in imports
        if each.in_function
        and not any(f"{each.target}.".startswith(f"{package}.") for package in OPTIONAL)
    ]


def ways_to_torch(start: str, imports: list[Import]) -> list[str]:
    """The imports by which a module, or one that it imports, asks for torch."""
    reached, waiting = {start}, [start]
    found = []
    while waiting:
        module = waiting.pop()
        for each in imports:
            if each.importer == module and not each.in_function:
                if each.target.split(".")[0] == "torch":
                    found.append(str(each))
                elif each.target not in reached:
                    reached.add(each.target)
                    waiting.append(each.target)
    return found


def project_sources() -> dict[str, str]:
    """Every file of the project that is not a test, as dotted name -> source."""
    folders = ("megatron", "tools", "tasks", "examples", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths += ROOT.glob("pretrain_*.py")
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in paths
    }


SOURCES = project_sources()
IMPORTS = imports_of(SOURCES)
INNER = [each for each in IMPORTS if each.target in SOURCES]  # of the project's own modules


def test_every_file_stands_on_a_floor() -> None:
    strangers = []
    for module in SOURCES:
        try:
            unit_and_floor(module)
        except KeyError:
            strangers.append(module)
    assert strangers == []


def test_imports_go_down() -> None:
    assert wrong_floors(INNER) == []


def test_imports_go_in_no_circle() -> None:
    assert circle(INNER) == []


def test_imports_stand_at_the_top() -> None:
    assert hidden(IMPORTS) == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_arithmetic_is_free_of_torch(module: str) -> None:
    assert module in SOURCES
    assert ways_to_torch(module, IMPORTS) == []


def test_the_command_line_is_read_before_torch_is_loaded() -> None:
    program = "import sys, megatron.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# The rules find what they are for, in sources made up to break them.


OTHERS = dict.fromkeys(["megatron.__init__", "megatron.model.__init__", "megatron.model.b"], "")


@pytest.mark.parametrize(
    ("importer", "source", "is_wrong"),
    [
        ("megatron.mpu.a", "import megatron.model.b", True),
        ("megatron.mpu.a", "from megatron.model import b", True),
        ("megatron.mpu.a", "import megatron.model", True),
        ("megatron.mpu.a", "from megatron import model", True),
        ("megatron.mpu.a", "from ..model.b import c", True),
        ("megatron.model.a", "from megatron.pipeline.b import c", True),
        ("megatron.monitor.a", "from megatron.tokenizer.b import c", True),
        ("megatron.monitor.a", "from megatron.arguments import c", True),
        ("megatron.monitor.a", "from megatron.validation.b import c", True),
        ("megatron.config.a", "from megatron.validation.b import c", True),
        ("megatron.validation.a", "from megatron.blend import c", False),
        ("megatron.training.a", "from tools.b import c", True),
        ("tools.a", "from benchmarks.b import c", True),
        ("pretrain_x", "from tools.b import c", True),
        ("megatron.monitor.a", "from megatron.config.model import c", False),
        ("megatron.model.a", "from megatron.mpu.b import c", False),
        ("megatron.model.a", "from .b import c", False),
        ("megatron.model.__init__", "from .b import c", False),
        ("pretrain_x", "from megatron.training import b", False),
    ],
)
def test_an_import_up_or_across_is_found(importer: str, source: str, is_wrong: bool) -> None:
    assert bool(wrong_floors(imports_of(OTHERS | {importer: source}))) is is_wrong


def test_a_circle_is_found() -> None:
    straight = {"a": "import b", "b": "import c", "c": "def f():\n    import a"}
    assert circle(imports_of(straight)) == []
    assert set(circle(imports_of(straight | {"c": "import a"}))) == {"a", "b", "c"}


def test_a_hidden_import_is_found() -> None:
    lines = ["import transformers", "from torch.utils.tensorboard import S", "import torch"]
    source = "def f():\n" + "".join(f"    {line}\n" for line in lines)
    assert hidden(imports_of({"a": source})) == ["a line 4 imports torch"]
    assert len(hidden(imports_of({"a": "class A:\n def f(self):\n  import json"}))) == 1


def test_a_way_to_torch_is_found() -> None:
    sources = {"a": "import b", "b": "from torch import nn", "c": "import json"}
    assert ways_to_torch("a", imports_of(sources)) == ["b line 1 imports torch"]
    assert ways_to_torch("c", imports_of(sources)) == []


def test_a_folder_without_a_floor_is_found() -> None:
    with pytest.raises(KeyError):
        unit_and_floor("megatron.attic.a")
