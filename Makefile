# Every target installs what it needs into .venv first, so any of them can be the first command on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
RECIPE ?= recipes/demo/sft/config_arithmetic.yaml
ACCELERATOR ?=
NUM_PROCESSES ?=
ARGS ?=
MODEL ?= data/demo/run
OUT ?= $(MODEL)-merged
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help install demo sft check prepare preview verify chat merge compare report bench bench-gpu test test-slow quality style schema clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

.venv/installed-deepspeed: .venv/installed
	$(BIN)/pip install --quiet -e '.[deepspeed]'
	touch $@

install: .venv/installed ## Install into .venv

demo: .venv/installed ## Train a tiny model to do sums, on a CPU, in minutes
	@$(RUN) python scripts/make_demo.py $(DEMO)
	@echo "before training:"
	@$(RUN) python scripts/score_demo.py $(DEMO)/model --problems $(DEMO)/held_out.jsonl
	@$(RUN) python src/open_r1/sft.py --config recipes/demo/sft/config_arithmetic.yaml $(ARGS)
	@echo "after training:"
	@$(RUN) python scripts/score_demo.py $(DEMO)/run --problems $(DEMO)/held_out.jsonl --samples 3

sft: .venv/installed $(if $(findstring zero,$(ACCELERATOR)),.venv/installed-deepspeed) ## Train: make sft RECIPE=... [ACCELERATOR=zero3] [NUM_PROCESSES=8] [ARGS="..."]
	$(RUN) accelerate-launch $(if $(ACCELERATOR),--config_file recipes/accelerate_configs/$(ACCELERATOR).yaml) \
		$(if $(NUM_PROCESSES),--num_processes $(NUM_PROCESSES)) src/open_r1/sft.py --config $(RECIPE) $(ARGS)

check: .venv/installed $(if $(findstring zero,$(ACCELERATOR)),.venv/installed-deepspeed) ## Check a recipe without training, and plan it, also for GPUs elsewhere: make check RECIPE=... [ACCELERATOR=zero3 NUM_PROCESSES=16]
	$(RUN) python $(if $(ACCELERATOR),scripts/plan.py --config_file recipes/accelerate_configs/$(ACCELERATOR).yaml --num_processes $(or $(NUM_PROCESSES),1)) \
		src/open_r1/sft.py --config $(RECIPE) --dry_run $(if $(ACCELERATOR),,$(if $(NUM_PROCESSES),--plan_processes $(NUM_PROCESSES))) $(ARGS)

prepare: .venv/installed ## Tokenise and pack a recipe's data on a CPU: make prepare RECIPE=... [ARGS="--export DIR"]
	$(RUN) python scripts/prepare.py --config $(RECIPE) $(ARGS)

preview: .venv/installed ## Show samples with supervised tokens coloured, and write preview.html: make preview RECIPE=...
	$(RUN) python scripts/preview.py --config $(RECIPE) $(ARGS)

verify: .venv/installed ## Check that a saved model can be served: make verify MODEL=... [ARGS="--prompt TEXT"]
	$(RUN) python scripts/verify.py $(MODEL) $(ARGS)

chat: .venv/installed ## Talk to a saved model: make chat MODEL=... [ARGS="--temperature 0.6"]
	@$(RUN) python scripts/chat.py $(MODEL) $(ARGS)

merge: .venv/installed ## Merge a LoRA adapter into its base: make merge MODEL=... [OUT=...]
	$(RUN) python scripts/merge.py $(MODEL) $(OUT) $(ARGS)

compare: .venv/installed ## Say where two runs part, in data and losses: make compare A=... B=... [ARGS="--tolerance 1e-3"]
	$(RUN) python scripts/compare_runs.py $(A) $(B) $(ARGS)

report: .venv/installed ## Write a run's report again, or one page of several runs: make report RUNS="A B" [ARGS="--out page.html"]
	$(RUN) python scripts/report.py $(or $(RUNS),$(MODEL)) $(ARGS)

bench: .venv/installed ## Measure start-up, training and each default beside trl sft, on a CPU: make bench [ARGS="train --repeats 5"]
	$(RUN) python scripts/bench.py $(ARGS) && $(RUN) python scripts/bench.py table

bench-gpu: .venv/installed ## Measure training beside trl sft on one GPU, in ten minutes, without network: make bench-gpu [ARGS="--only 8B"]
	$(RUN) python scripts/bench.py gpu $(ARGS) && $(RUN) python scripts/bench.py table

test: .venv/installed ## Tests that need no GPU and no network, under 12 minutes on 2 cores
	$(RUN) python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: .venv/installed-deepspeed ## Tests that launch ZeRO, kill runs and take longer
	$(RUN) python -m pytest -o addopts= -q tests/slow $(ARGS)

quality: .venv/installed ## Lint and formatting, changing nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

style: .venv/installed ## Lint and format in place
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

schema: .venv/installed ## Write src/open_r1/schema.json from the configs
	$(RUN) python scripts/make_schema.py

clean: ## Remove the demo's files and caches (not .venv)
	rm -rf $(DEMO) .pytest_cache .ruff_cache
