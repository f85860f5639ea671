# Two commands do everything on a machine with Python 3.11 and a C++ compiler: `make train` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# No network look-ups for what is on disk; quiet progress of libraries.
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: train test test-long coverage newest lint bench setup dev baseline compare-baseline docs

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# What tests, lint and docs need besides.
$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

dev: $(VENV)/ready-dev

models/smollm2-135m/source.json: | $(VENV)/ready
	$(BIN)/python launch/fetch.py model smollm2-135m

# Fine-tune a real Llama on problems that need no download, and score base and tuned model on held-out ones.
train: setup models/smollm2-135m/source.json
	@echo "== the base model"
	$(BIN)/python launch/evaluate.py --model models/smollm2-135m --tasks sums --out runs/quickstart/base
	@echo; echo "== training, then the tuned model"
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus 1 launch/train.py --recipe quickstart

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One rerun, and its error is printed: ranks on a machine that does other work may miss each other's time limits.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long" --durations=15 \
		--reruns 1 --rerun-show-tracebacks

test-long: dev models/smollm2-135m/source.json
	$(BIN)/python -m pytest -m long

# Lines of neuroada/ that the tests' own processes run (ranks and commands that they start are not counted).
coverage: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long" --cov neuroada --cov-report term:skip-covered

# The fast tests with the newest versions that pyproject.toml's ranges allow, in an environment of its own.
newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade --editable ".[deepspeed,quickstart,dev]"
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -m "not long" tests/ops tests/adapter tests/sharding tests/test_private_apis.py

# Before a refactor, and after it: every method under every strategy loses the same, to the last digit.
baseline compare-baseline: setup
	$(BIN)/python benchmarks/baseline.py $(if $(filter baseline,$@),record,compare)

# The pages of docs/ with the API reference from the docstrings, into build/site.
docs: dev
	$(BIN)/mkdocs build --quiet

bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sampled_gradient.py
