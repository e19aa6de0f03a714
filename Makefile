# make install   .venv with the project, its dependencies and the development tools
# make demo      ask a long document questions: Star Attention on two ranks, then dense attention
# make serve     the demo model as a service on two ranks: OpenAI's API and a page at http://127.0.0.1:8000
# make test      linters, type checker, tests
# make gpu       doctor, tests and benchmarks on a GPU, at most 25 minutes; resumes; results in build/gpu_check
# make doctor    what is installed, what works, which attention kernel would run
#
# PYTHON chooses the Python: make test PYTHON=python3.12 makes .venv anew where it holds another one.
# PIP_OPTIONS reaches every pip call. For PyTorch's CPU build without CUDA packages, where PyPI's would bring them:
#   make install PIP_OPTIONS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
# As 3.11; the stamp's name carries it, so that an environment of another Python does not count as installed.
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
VERSION := $(shell $(PYTHON) $(PRINT_VERSION))
STAMP := $(VENV)/.installed-$(VERSION)
DEMO := build/demo_checkpoint

.PHONY: install demo serve test test-all check format doctor gpu clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch comes first, by itself: asked for by another package, pip may take another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(if $(VERSION),,$(error PYTHON=$(PYTHON) does not run))
	test "$$($(BIN)/python $(PRINT_VERSION) 2>/dev/null)" = $(VERSION) || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DEMO): $(STAMP) assets/demo_model/model.safetensors
	rm -rf $@
	$(BIN)/python tools/convert_checkpoint.py import --source assets/demo_model --target $@

demo: $(DEMO)
	@echo; echo '--- Star Attention on two context-parallel ranks ---'
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 tools/generate.py --config-name demo
	@echo; echo '--- the same question, dense attention on one rank ---'
	OMP_NUM_THREADS=2 $(BIN)/torchrun --nproc-per-node 1 tools/generate.py --config-name demo attention=dense
	@echo; echo '--- another question, Star Attention ---'
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 tools/generate.py --config-name demo_second

serve: $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 tools/serve.py --config-name serve_demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two files of tests side by side, in their order: xdist would begin with those of most tests, and the long ones, of few,
# would be left for the end. Alone are those in which time decides: services, and ranks that hang or die.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ALONE := $(wildcard tests/distributed/test_failures.py tests/distributed/test_serve*.py)
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore %)

test: check
	$(PYTEST) $(TOGETHER)
	$(PYTEST) $(ALONE)

# The slow ones, too: every recorded case at every layout.
test-all: check
	$(PYTEST) -m "slow or not slow" $(TOGETHER)
	$(PYTEST) -m "slow or not slow" $(ALONE)

doctor: $(STAMP)
	$(BIN)/python tools/doctor.py

gpu: $(STAMP)
	$(BIN)/python tools/gpu_check.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build
