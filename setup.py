"""Builds the C++ index builders; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc/data").glob("*.cpp"))

setup(
    ext_modules=[Pybind11Extension("megatron.data._index", SOURCES, cxx_std=17)],
    cmdclass={"build_ext": build_ext},
)
