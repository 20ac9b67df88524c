PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= hf_lipschitz_demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all quality style clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/hf-lipschitz demo --output $(OUTPUT)

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first and by its exact version: with it there, nothing else asks the registry for a CUDA build.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[$(patsubst .%,%,$(notdir $@))]"
	touch $@
