# Two commands: `make run` and `make test`. Each sets everything up first; when that is done already it takes a fraction of a second.
# PYTHON, VENV, TORCH_REQUIREMENT, EXTRAS and HOROVOD_* are read by launch/install.sh: `launch/install.sh --help`.

VENV ?= .venv
NP ?= 2
JOBS ?= 2
ARGS ?=
export VENV
# A relative VENV is relative to this directory, wherever the tools are started from.
BIN := $(abspath $(VENV))/bin

.DEFAULT_GOAL := help
.PHONY: help install run test test-cluster check bench picture clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16
	@echo '  Variables: NP (ranks, now $(NP)), JOBS (test files at a time, now $(JOBS)), ARGS (more overrides for the job), VENV, PYTHON, TORCH_REQUIREMENT, EXTRAS'

install: ## make the environment, Horovod included
	@launch/install.sh

run: install ## set up and run the main job on two ranks
	$(BIN)/horovod-jobs experiment=main launch=local launch.np=$(NP) $(ARGS)

test: install ## set up and pass the tests: one process first, then two ranks, then four
	$(BIN)/python -m pytest tests --ignore=tests/parallel --ignore=tests/cluster -m "not thorough" -n $(JOBS) --dist loadfile
	$(BIN)/python -m tests.in_world -np 2 tests/parallel
	$(BIN)/python -m tests.in_world -np 4 $(addprefix tests/parallel/test_,adasum.py groups.py hierarchy.py parameter_server.py parameter_server_overlap.py parameter_server_stages.py)

test-cluster: install ## the tests that need root, Slurm, buildah or more time than continuous integration has
	$(BIN)/python -m pytest tests/cluster
	$(BIN)/python -m pytest tests/integration -m thorough

check: install ## ruff, mypy and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

bench: install ## every figure that the README quotes; takes long, wants a quiet machine
	@set -e; for script in benchmarks/[a-z]*.py; do \
	  name=$$(basename $$script .py); \
	  case $$name in common|hosts) continue;; \
	    network|scale_model) [ "$$(id -u)" = 0 ] || { echo "== $$name is left out: it makes hosts, which only root may"; continue; };; \
	  esac; \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name; \
	done

picture: ## docs/images/report.png, from the newest run's report (needs Chromium)
	$(BIN)/python docs/images/screenshot.py runs/latest/report.html

clean: ## remove what tools leave behind; the environment, runs and artifacts stay
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
