# Everything that a person does with this repository. `make run` and `make test` need Python >= 3.11, make and git.
PYTHON ?= python3
# An extra package index for torch (a CPU-only build is much smaller); empty takes the default index's.
TORCH_INDEX_URL ?=
CLUSTER ?= dstrain
NODES ?= 3

BIN := .venv/bin
CONSTRAINTS := $(wildcard constraints/*.txt)
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: help run test e2e soak cluster install cluster-down lint format bench generate clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-run: .venv/bin/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[operator,trainer]'
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[operator,trainer,dev]'
	@touch $@ .venv/installed-run

run: .venv/installed-run  ## train examples/mini.yaml on this machine, with live progress
	$(BIN)/dstrain run examples/mini.yaml

test: .venv/installed-dev  ## all tests that need no cluster
	$(BIN)/python -m pytest

cluster: .venv/installed-dev  ## a local Kubernetes: kind where Docker answers, network namespaces otherwise (root)
	@$(BIN)/python -m e2e.clusters up --name $(CLUSTER) --nodes $(NODES)

install: .venv/installed-dev  ## build this checkout's images and install the chart into that cluster
	$(BIN)/python -m e2e.install $(CLUSTER)

cluster-down: .venv/installed-dev  ## stop and remove it
	$(BIN)/python -m e2e.clusters down --name $(CLUSTER)

e2e: .venv/installed-dev  ## the suites on a real cluster with the real images and chart
	$(BIN)/python -m pytest e2e --ignore=e2e/tests --timeout=1500 --durations=25

soak: .venv/installed-dev  ## half an hour of random faults on a cluster of its own, beside the undisturbed run
	$(BIN)/python -m e2e.soak

lint: .venv/installed-dev  ## formatting, style, types and the rules of who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed-dev  ## side-by-side figures of this machine
	$(BIN)/python -m benchmarks

generate: .venv/installed-dev  ## everything that is made from code: CRD, reference pages, dashboards
	$(BIN)/python -m dstrain_api.schema > crds/deepseektrainings.yaml
	cp crds/deepseektrainings.yaml charts/deepseek-operator/files/
	$(BIN)/python -m dstrain_api.reference > docs/reference/deepseektraining.md
	$(BIN)/python -m dashboards.generate
	cp dashboards/json/*.json charts/deepseek-operator/files/dashboards/
	$(BIN)/python -m deepseek_trainer.data.mini

clean:  ## remove the environment and all caches of this checkout
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache runs
