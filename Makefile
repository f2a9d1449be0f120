# The README's two commands. Each sets up what it needs in .venv and does its job; run again, it does only what is left.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint benchmark clean

demo: .venv/ready
	$(BIN)/python pipelines/cache_layers.py --layers maxp_5_3 fc7-relu
	$(BIN)/python pipelines/train_heads.py --layers fc7-relu --heads similarity

test: .venv/ready lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: .venv/ready
	$(BIN)/python -m tests.benchmarks.bench_store
	$(BIN)/python -m tests.benchmarks.bench_networks
	$(BIN)/python -m tests.benchmarks.bench_heads

# Exact versions, so that a wheel lying on the machine cannot slip in beside a torchvision that was not built for it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,draw]"
	$(BIN)/python -c "import torch, torchvision; torchvision.ops.nms"
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
