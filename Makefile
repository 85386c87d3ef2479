# Everything happens in .venv of this checkout. `make setup` is instant when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.triloom-deps
LAUNCHERS := $(VENV)/launchers
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*.hpp)
PIP := $(BIN)/python -m pip install -qq -c constraints.txt
PIP_FAILED := make setup: pip failed, see above. It needs a package index; PIP_INDEX_URL names another one.
PART ?= build,test
# A process for each core, up to four, and each file in one of them. Tests under mpirun take all cores themselves.
SPREAD := -n auto --maxprocesses 4 --dist loadfile
PURE := $(BIN)/python -m pytest $(SPREAD) tests/pure
RANKS := $(BIN)/python -m pytest tests/ranks
# Triton reads TRITON_INTERPRET when a kernel is decorated: what interprets and what compiles are processes of their own.
INTERPRET := TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SPREAD) tests/kernels/interpret
COMPILE := TRITON_CACHE_DIR=build/triton $(BIN)/python -m pytest tests/kernels/compile

.DEFAULT_GOAL := help
.PHONY: help setup launchers demo test test-full kernels-full check bench gpu clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup: .setup.stamp  ## build everything into .venv (Open MPI included)

# The environment and the editable install; again when what it is made from changes.
$(DEPS): constraints.txt pyproject.toml setup.py $(wildcard tools/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"make setup: $(PYTHON) is %d.%d, triloom needs 3.11 or later: make setup PYTHON=python3.11" % v)'
	@command -v $${CXX:-c++} >/dev/null || { echo "make setup: no C++ compiler ($${CXX:-c++}); install g++ or set CXX" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11 || { echo "$(PIP_FAILED)" >&2; exit 1; }
	$(PIP) --no-build-isolation -e '.[mpi,plot,data,dev]' || { echo "$(PIP_FAILED)" >&2; exit 1; }
	rm -rf triloom.egg-info  # an old build's, which would hide the metadata just installed
	install -m 755 tools/mpirun $(BIN)/mpirun
	install -m 644 tools/prte-mca-params.conf tools/openmpi-mca-params.conf $(VENV)/etc/
	@touch $@

# The extension alone; recompiles only the files that changed.
.setup.stamp: $(DEPS) $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -c 'import triloom._C'
	@touch $@

launchers: $(LAUNCHERS)/mpich/ready $(LAUNCHERS)/impi-rt/ready  ## MPICH and Intel MPI beside .venv, for tests (300 MB)

# A venv with another MPI, its launcher and an mpi4py that loads it; all the rest is that of .venv.
$(LAUNCHERS)/%/ready: constraints.txt | $(DEPS)
	rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq -c constraints.txt $* mpi4py || { echo "$(PIP_FAILED)" >&2; exit 1; }
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' > $(@D)/beneath.pth
	@mv $(@D)/beneath.pth $(@D)/lib/python3.*/site-packages/
	@touch $@

demo: setup  ## train a transformer on 4 ranks with dp, pp and tp (under three minutes)
	$(BIN)/triloom demo

test: setup $(LAUNCHERS)/mpich/ready  ## pure and rank tests; kernels interpreted, and compiled for three architectures
	$(PURE) -m "not full"
	$(RANKS) -m "not full"
	$(INTERPRET) -m "not full"
	$(COMPILE) -m "not full"

test-full: setup launchers kernels-full  ## the same with the full product of meshes and options
	$(PURE)
	$(RANKS)

kernels-full: setup  ## the kernel tests alone, every tuned configuration compiled
	$(INTERPRET)
	$(COMPILE)

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## the bench suite against its peers
	$(BIN)/python -m triloom_bench

gpu:  ## on a GPU box, with what its system python has: make gpu PART=build,test
	$(PYTHON) tools/gpu.py $(PART)

clean:  ## remove everything that was built, .venv included
	rm -rf $(VENV) build .setup.stamp *.egg-info runtime/*.egg-info runtime/triloom/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find runtime kernels bench tests tools -name __pycache__ -prune -exec rm -rf {} +
