# Each target sets up what it needs in .venv and does its job; run again, it does only what is left. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo photos test lint benchmark clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: .venv/ready ## render demo faces, cache two layers of them, train a head
	$(BIN)/python pipelines/cache_layers.py --layers maxp_5_3 fc7-relu
	$(BIN)/python pipelines/train_heads.py --layers fc7-relu --heads similarity

PHOTOS ?= store/olivetti

photos: .venv/ready ## a trained network beside a random one, on real photographs (PHOTOS=folder for your own: anna/1.jpg)
	[ "$(PHOTOS)" != store/olivetti ] || $(BIN)/python pipelines/fetch_olivetti.py --out store/olivetti
	$(BIN)/python pipelines/find_faces.py "$(PHOTOS)" --out store/photos_faces.csv || [ $$? -eq 3 ]
	$(BIN)/python pipelines/cache_layers.py --images store/photos_faces.csv --store store/photos.zarr \
		--backbone dlib_resnet_v1 --weights packaged --layers block1_3 block2_4 block3_3 block4_3 pooled descriptor
	$(BIN)/python pipelines/cache_layers.py --images store/photos_faces.csv --boxes store/photos_faces.csv --store store/photos.zarr \
		--backbone vggface --weights random:0 --layers maxp_3_3 maxp_5_3 fc7-relu descriptor
	$(BIN)/python pipelines/compare_networks.py store/photos.zarr --out store/photos_layers.csv

test: .venv/ready lint ## check style and types, run all tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

lint: .venv/ready ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: .venv/ready ## measure speed and memory, each beside what it is compared with
	$(BIN)/python -m tests.benchmarks.bench_store
	$(BIN)/python -m tests.benchmarks.bench_cold
	$(BIN)/python -m tests.benchmarks.bench_cluster
	$(BIN)/python -m tests.benchmarks.bench_networks
	$(BIN)/python -m tests.benchmarks.bench_heads
	$(BIN)/python -m tests.benchmarks.bench_queries
	$(BIN)/python -m tests.benchmarks.bench_explain
	$(BIN)/python -m tests.benchmarks.bench_remote

# Exact versions, so that a wheel lying on the machine cannot slip in beside a torchvision that was not built for it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,draw,trained,faces]"
	$(BIN)/python -c "import torch, torchvision; torchvision.ops.nms"
	touch $@

clean: ## remove the environment and caches; store/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
