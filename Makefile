# The active Python is used as it is where it holds all packages; otherwise `.venv` is made and
# filled once. `make VENV=DIR ...` makes or uses the environment in DIR whatever is active.

PACKAGES := hypothesis matplotlib mypy numpy pre_commit pybind11 pytest rich ruff safetensors \
	sentencepiece tensorboard tokenizers torch transformers yaml
LINT = $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

ifndef VENV
ACTIVE := $(shell python3 -c "import importlib.util as u, sys; \
	all(map(u.find_spec, '$(PACKAGES)'.split())) and print(sys.executable)" 2>/dev/null)
VENV := .venv
endif

ifdef ACTIVE
PYTHON := $(ACTIVE)
else
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
endif

.PHONY: help install quickstart test parity parity-hf dry-runs planner-validation kernel-report \
	gpu-check lint format

help:
	@echo "make quickstart          train a small BERT on this machine and export it"
	@echo "make test                run the tests"
	@echo "make parity              compare 120 layouts drawn at random with one process (LAYOUTS, SEED)"
	@echo "make parity-hf           compare 200 random models with transformers 4.34.0 (CASES, ON_RANKS, SEED)"
	@echo "make dry-runs            plan every launch script for its number of GPUs (HARDWARE)"
	@echo "make planner-validation  predicted step times beside published ones"
	@echo "make kernel-report       registers, memory and spills of each CUDA kernel (ARCH); needs no GPU"
	@echo "make gpu-check           build, test and measure on this GPU, in under 9 minutes (CHECK)"
	@echo "make lint                check style, format and types"
	@echo "make format              put the files into their format"
	@echo "make install             only make the environment that the others use"

install: $(INSTALLED)

quickstart: $(INSTALLED)
	@$(PYTHON) examples/quickstart.py

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q

LAYOUTS := 120
SEED := 1

parity: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.parity.full --layouts $(LAYOUTS) --seed $(SEED)

CASES := 200
ON_RANKS := 20

# OLD_TRANSFORMERS names a Python that has transformers 4.34.0; without it one is installed, once.
parity-hf: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.hf.old.full --cases $(CASES) --layouts $(ON_RANKS) \
		--seed $(SEED)

HARDWARE := h100-sxm

dry-runs: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.examples.full --hardware $(HARDWARE)

planner-validation: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) benchmarks/planner_validation.py

ARCH := 70 80 90 100

kernel-report: $(INSTALLED)
	@$(PYTHON) tools/kernel_report.py --arch $(ARCH)

# Whatever Python has PyTorch for the GPU is taken as it is; nothing is installed for it.
# CHECK holds further options, such as `--only kernels` (python3 -m benchmarks.gpu.check --help).
gpu-check:
	@python3 -m benchmarks.gpu.check $(CHECK)

lint: $(INSTALLED)
	@$(LINT)

format: $(INSTALLED)
	@$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/data/*.cpp)
	@echo "Installing into $(VENV): this takes a minute or two, once."
	@test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt \
		-e '.[dev,hf,kernels,plots,progress,sentencepiece,tensorboard]'
	@touch $@
