# The project's commands. `make help` lists them. Each one sets up .venv if it is missing.
PYTHON ?= python3
RUN := .venv/bin/python
CHIP_COMPILERS := 'libtpu==0.0.42.*' jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2  # as in pyproject.toml
NOTEBOOKS := figures/*.ipynb  # make figures NOTEBOOKS=figures/collapse.ipynb runs one
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo reproduce test test-chips lint bench bench-chip bench-compare bench-growth figures games images measure-prepare lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/complete ## build .venv from requirements.lock (Python 3.11 or newer)

.venv/complete: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: $(PYTHON) is Python {v[0]}.{v[1]}, 3.11 or newer is wanted; name one with  make PYTHON=python3.12 …")'
	@echo "Setting up .venv (about 500 MB, one or two minutes)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

demo: .venv/complete ## train a small ladder live, fit its scaling law, judge and draw its collapse (4 minutes on 2 idle cores)
	$(RUN) -m experiments.run experiments/demo.yaml
	$(RUN) -m figures collapse runs/demo --out runs/demo/collapse.png

reproduce: .venv/complete ## train every laptop experiment (hours on 2 cores; resumes where it stopped), save the logs, draw the figures
	$(RUN) -m experiments.package_text pandas
	for sweep in experiments/laptop_*.yaml; do $(RUN) -m experiments.run $$sweep wandb_mode=disabled || exit; done
	for tag in $$(ls runs | grep ^laptop_); do $(RUN) save_logs.py --runs runs --tag $$tag || exit; done
	$(MAKE) figures

test: .venv/complete ## run the tests
	$(RUN) -m pytest --numprocesses auto --dist loadfile

test-chips: .venv/complete .chips/complete ## compile for a TPU and an H100 without having them, and check the programs (3 minutes)
	PYTHONPATH=.chips JAX_PLATFORMS=cpu $(RUN) -m pytest --numprocesses 0 tests/test_chips.py

.chips/complete: pyproject.toml
	@echo "Downloading the compilers of TPUs and NVIDIA GPUs into .chips (400 MB)"
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .chips $(CHIP_COMPILERS)
	@touch $@

lint: .venv/complete ## check the style
	.venv/bin/ruff check .

bench: .venv/complete ## measure the training step against this machine's matmul rate (20 minutes): benchmarks/bench.json
	$(RUN) -m benchmarks.run --json benchmarks/bench.json

bench-chip: .venv/complete ## on a machine with GPUs or TPUs: shares of their peak, make bench-chip CHIP=h100
	$(RUN) -m benchmarks.chip $(CHIP) --json benchmarks/chip_$(CHIP).json

bench-compare: .venv/complete ## the same beside another revision: make bench-compare REV=HEAD~1
	$(RUN) -m benchmarks.compare $(REV)

bench-growth: .venv/complete ## step time against width and batch size, drawn in benchmarks/growth.png
	$(RUN) -m benchmarks.growth

figures: .venv/complete ## run the notebooks on the shipped logs (LOG=logs/paper/mlp.pkl: on others, into runs/figures)
	$(RUN) -m figures.notebook $(NOTEBOOKS)
ifndef LOG
	$(RUN) -m figures collapse logs/laptop_text.parquet --out figures/png/laptop_text_collapse.png
	$(RUN) -m figures horizon logs/laptop_text_const.parquet --out figures/png/laptop_text_const_horizon.png
	@test ! -e logs/paper/mlp.pkl || $(RUN) -m figures reproduced logs/mlp_384.parquet logs/paper/mlp.pkl --out figures/png/mlp_384.png
endif

games: .venv/complete ## play 4,000 chess games with Stockfish into data/games (needs the program stockfish)
	$(RUN) tests/make_games.py data/games --games 4000

images: .venv/complete ## cut one CIFAR-5M-sized part (3 GB) from photographs into data/images
	$(RUN) tests/make_images.py data/images --parts 1 --images 1000448

measure-prepare: .venv/complete ## rates, memory, kills and a full disk at true size (15 minutes, 60 GB, disk part as root)
	$(RUN) tests/measure_prepare.py data/measure

lock: ## refresh requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --python-version 3.11 --universal --upgrade --no-header --no-emit-index-url -o requirements.lock

clean: ## remove .venv and caches (never runs/ or logs/)
	rm -rf .venv .chips .pytest_cache .ruff_cache
