# One target a command. The first one that is used sets up .venv. `make help` lists them.
EXP   ?= ddpm_digits
ARGS  ?=
# The JAX to install: the one installed already, else the one for the accelerator of this machine.
ACCEL ?= $(or $(patsubst .venv/.ready-%,%,$(firstword $(wildcard $(foreach accel,cuda13 cuda12 tpu cpu,.venv/.ready-$(accel))))),$(shell sh .ci/accelerator))
ACCEL := $(ACCEL)
WEIGHTS ?=
# of `make score`, `interpolate` and `restore`: an image, a folder of images, an array file, or test (the test set)
INPUT ?= test
# recipes of `make compare`, with numbers of steps that take the same time
COMPARE ?= ae_digits:5000 dae_digits:5000 vae_digits:4800 hvae_digits:2300 ddpm_digits:2700 vdm_digits:1900

comma := ,
extra := $(if $(filter-out cpu,$(ACCEL)),$(ACCEL))
python := .venv/bin/python
cli := VDM_JAX_MAKE=1 $(python) -m vdm_jax
base  := .venv/.ready-$(ACCEL)
tools := .venv/.ready-$(ACCEL)-test
mutators := .venv/.ready-$(ACCEL)-mutants
auditor := .venv/.ready-$(ACCEL)-audit

.DEFAULT_GOAL := help
.PHONY: help train sample eval test test-all faults lint format audit accuracy derivations mutants figures bench
.PHONY: compare import score interpolate restore

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile
	@echo 'EXP=name or path of a recipe (default $(EXP)), ARGS="--steps 500 ...", ACCEL=cpu, cuda13, cuda12 or tpu (default: detected); options: make train ARGS=--help'

train: $(base) ## train a recipe, or resume its run; then evaluate and sample
	@$(cli) train $(EXP) $(ARGS)

sample: $(base) ## sample from the latest checkpoint of a run
	@$(cli) sample $(EXP) $(ARGS)

eval: $(base) ## evaluate the latest checkpoint of a run on the test set
	@$(cli) evaluate $(EXP) $(ARGS)

score: $(base) ## likelihood of each image of INPUT (an image, a folder, an array, or test); classes: ARGS=--classify
	@$(cli) score $(EXP) $(INPUT) $(ARGS)

interpolate: $(base) ## images between pairs of images of INPUT, through the latents of the ODE
	@$(cli) interpolate $(EXP) $(INPUT) $(ARGS)

restore: $(base) ## restore images of INPUT from a part: ARGS="--measurement right_half, box or super_resolution"
	@$(cli) restore $(EXP) $(INPUT) $(ARGS)

compare: $(base) ## train several recipes and compare them in a table and a figure: COMPARE="RECIPE:STEPS ..."
	@$(cli) compare $(COMPARE) $(ARGS)

import: $(base) ## import the weights of a diffusers folder as a run: WEIGHTS=...; export a run: ARGS="--export FOLDER"
	@$(cli) import $(WEIGHTS) --recipe $(EXP) $(ARGS)

# Most of the time goes into compiling, which takes a third less without optimizations. Derivations run with them.
test: $(tools) ## run the tests, except slow ones
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(python) -m pytest -q -n auto -m "not slow" $(ARGS)

test-all: $(tools) ## run all tests
	@$(python) -m pytest -q -n auto $(ARGS)

faults: $(tools) ## run the fault-injection tests of training
	@$(python) -m pytest -q tests/faults $(ARGS)

lint: $(tools) ## run ruff, check the format and the types
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m pyright

format: $(tools) ## format the code
	@$(python) -m ruff check --fix
	@$(python) -m ruff format

# Not part of lint, which works offline and depends on the code alone: this queries a service that changes daily.
audit: $(auditor) ## list known vulnerabilities of the pinned versions (needs a network)
	@$(python) -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

accuracy: $(tools) ## compare every kernel in float32 with 50-digit arithmetic
	@$(python) -m tests.accuracy $(ARGS)

figures: $(tools) ## regenerate the figures of the documentation
	@$(python) -m docs.figures
	@$(python) -m docs.failures
	@$(python) -m docs.dynamics
	@$(python) -m docs.samplers

bench: $(tools) ## run the benchmarks, which print ratios measured in one run (on an otherwise idle machine)
	@$(python) -m benchmarks.overhead
	@$(python) -m benchmarks.peers
	@$(python) -m benchmarks.startup
	@$(python) -m benchmarks.pipeline digits
	@$(python) -m benchmarks.convolutions
	@$(python) -m benchmarks.score_matching

derivations: $(tools) ## check every derivation of the catalog, one line an entry
	@$(python) -m pytest -q -n auto tests/derivations --derivations $(ARGS)

mutants: $(mutators) ## run mutation tests: the tests must detect every change of an equation
	@$(python) -m tests.mutants $(ARGS)

$(base): pyproject.toml constraints.txt
	@sh .ci/setup "train$(if $(extra),$(comma)$(extra))" $@

$(tools): pyproject.toml constraints.txt
	@sh .ci/setup "test$(if $(extra),$(comma)$(extra))" $@ $(base)

$(mutators): pyproject.toml constraints.txt
	@sh .ci/setup "test,mutants$(if $(extra),$(comma)$(extra))" $@ $(tools) $(base)

$(auditor): pyproject.toml constraints.txt
	@sh .ci/setup "audit$(if $(extra),$(comma)$(extra))" $@ $(base)
