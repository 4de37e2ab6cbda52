# One command each; the first use of any of them sets up .venv by itself. `make help` lists them.
EXP   ?= ddpm_digits
ARGS  ?=
# Which JAX: what an earlier command has installed, else what the machine has.
ACCEL ?= $(or $(patsubst .venv/.ready-%,%,$(firstword $(wildcard $(foreach accel,cuda13 cuda12 tpu cpu,.venv/.ready-$(accel))))),$(shell sh .ci/accelerator))
ACCEL := $(ACCEL)
WEIGHTS ?=
# experiments of `make ladder`, with numbers of steps that take the same time
LADDER ?= ae_digits:5000 dae_digits:5000 vae_digits:4800 hvae_digits:2300 ddpm_digits:2700 vdm_digits:1900

comma := ,
extra := $(if $(filter-out cpu,$(ACCEL)),$(ACCEL))
python := .venv/bin/python
base  := .venv/.ready-$(ACCEL)
tools := .venv/.ready-$(ACCEL)-test
mutators := .venv/.ready-$(ACCEL)-mutants
auditor := .venv/.ready-$(ACCEL)-audit

.DEFAULT_GOAL := help
.PHONY: help train sample eval test test-all faults lint format audit accuracy derivations mutants figures bench
.PHONY: ladder import

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile
	@echo 'EXP=name (default $(EXP)), ARGS="--steps 500 ...", ACCEL=cpu, cuda13, cuda12 or tpu (default: what is found); options: make train ARGS=--help'

train: $(base) ## train an experiment, or go on with it; then evaluate and draw
	@$(python) -m vdm_jax.training $(EXP) $(ARGS)

sample: $(base) ## draw images from the newest checkpoint
	@$(python) -m vdm_jax.training.evaluation.sampling $(EXP) $(ARGS)

eval: $(base) ## evaluate the newest checkpoint on the test set
	@$(python) -m vdm_jax.training.evaluation.report $(EXP) $(ARGS)

ladder: $(base) ## every kind of model on the digits, from autoencoder to diffusion: one table, one picture
	@$(python) -m vdm_jax.training.cli.compare $(LADDER) $(ARGS)

import: $(base) ## weights of a diffusers folder as a run: WEIGHTS=..., or one of a run: ARGS="--export FOLDER"
	@$(python) -m vdm_jax.training.cli.import_weights $(WEIGHTS) --experiment $(EXP) $(ARGS)

test: $(tools) ## the tests, but for the slow ones
	@$(python) -m pytest -q -n auto -m "not slow" $(ARGS)

test-all: $(tools) ## all tests
	@$(python) -m pytest -q -n auto $(ARGS)

faults: $(tools) ## break real training runs in every way there is: nothing may be lost
	@$(python) -m pytest -q tests/faults $(ARGS)

lint: $(tools) ## ruff, formatting, types
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m pyright

format: $(tools) ## put the code in its format
	@$(python) -m ruff check --fix
	@$(python) -m ruff format

# Not part of lint, which works offline and judges the code alone: this asks a service whose answer changes by the day.
audit: $(auditor) ## known vulnerabilities of the pinned versions (needs a network)
	@$(python) -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

accuracy: $(tools) ## every kernel in float32 against 50 digits
	@$(python) -m tests.accuracy $(ARGS)

figures: $(tools) ## draw the figures of docs anew
	@$(python) -m docs.figures
	@$(python) -m docs.failures
	@$(python) -m docs.dynamics
	@$(python) -m docs.samplers

bench: $(tools) ## what things cost, as ratios measured in one run (leave the machine alone meanwhile)
	@$(python) -m benchmarks.overhead
	@$(python) -m benchmarks.peers
	@$(python) -m benchmarks.startup
	@$(python) -m benchmarks.pipeline digits
	@$(python) -m benchmarks.convolutions
	@$(python) -m benchmarks.score_matching

derivations: $(tools) ## every derivation of the catalogue, one line an entry
	@$(python) -m pytest -q -n auto tests/derivations --derivations $(ARGS)

mutants: $(mutators) ## change the equations one place at a time: the tests must notice
	@$(python) -m tests.mutants $(ARGS)

$(base): pyproject.toml constraints.txt
	@sh .ci/setup "train$(if $(extra),$(comma)$(extra))" $@

$(tools): pyproject.toml constraints.txt
	@sh .ci/setup "test$(if $(extra),$(comma)$(extra))" $@ $(base)

$(mutators): pyproject.toml constraints.txt
	@sh .ci/setup "test,mutants$(if $(extra),$(comma)$(extra))" $@ $(tools) $(base)

$(auditor): pyproject.toml constraints.txt
	@sh .ci/setup "audit$(if $(extra),$(comma)$(extra))" $@ $(base)
