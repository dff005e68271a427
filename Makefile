# make demo: the whole DAG offline on the sample. make test: lint, types and tests. make e2e: servers, containers.
# make images: the step images, with one tag; VARIANT=cuda, BASE_IMAGE, REPOSITORY and TAG as images/build.sh says.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# A file's tests share what they start, so they stay in one process; integration's long files come first, as they are named.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test e2e soak cluster-test chart-test lint install images image-wheels lock audit golden docs gpu-wheels gpu-check clean

install: $(VENV)/.installed

# Everything as locked, by its hashes; torch as pip finds it (for CPUs or CUDA), of the one version that the project names.
PIP_INSTALL := $(BIN)/python -m pip install --quiet
LOCKED := $(PIP_INSTALL) --no-deps --no-build-isolation --require-hashes
$(VENV)/.installed: pyproject.toml pipelines/requirements/build.lock pipelines/requirements/development.lock
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(LOCKED) --requirement pipelines/requirements/build.lock
	$(LOCKED) --requirement pipelines/requirements/development.lock
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/spectraqlora run --workdir runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint images/*/Dockerfile

test: lint
	$(PYTEST)

# Images are built where a Docker engine answers.
e2e: install
	sh images/for-tests.sh
	$(PYTEST) -m 'e2e and not soak' -rs

# On a real cluster with Argo Workflows: that of KUBECONFIG, or one that SPECTRAQLORA_TEST_CLUSTER starts.
cluster-test: install
	$(BIN)/pytest tests/cluster -m cluster -rs --durations=0 --durations-min=1 -s

# Many more inputs of the kinds that the tests try, for hours.
soak: install
	$(PYTEST) -m "soak and not cluster" -rs

VARIANT ?= cpu
WHEELS := build/wheels/.$(VARIANT)

# The images' packages, fetched once and checked against the locks.
image-wheels: $(WHEELS)

$(WHEELS): $(wildcard images/*/*.lock) | $(VENV)/.installed
	PYTHON=$(BIN)/python VARIANT=$(VARIANT) sh images/wheels.sh
	touch $@

images: image-wheels
	VARIANT=$(VARIANT) sh images/build.sh

lock: install
	PATH="$(abspath $(BIN)):$$PATH" python images/lock.py

# Known vulnerabilities of what is locked; asks PyPI.
audit: install
	for lock in $(filter-out images/base/torch-cpu.lock,$(wildcard images/*/*.lock)) pipelines/requirements/*.lock; do \
		echo "$$lock"; \
		$(BIN)/uv tool run --from 'pip-audit>=2.10,<3' pip-audit --strict --disable-pip --require-hashes -r $$lock || exit 1; \
	done

# The chart under helm: $$HELM or that on PATH, else 3.10.1 from npm; and helm 4 from PyPI.
chart-test: install
	$(BIN)/pytest -m "e2e or not e2e" tests/integration/test_chart.py tests/unit/test_chart_values.py

# The pipeline as a cluster sees it, for reviewers; a test compares.
golden: install
	for name in minimal full; do \
		$(BIN)/spectraqlora compile --target kubernetes --values tests/golden/values-$$name.yaml \
			--methods hybrid --output tests/golden/pipeline-$$name.yaml || exit 1; \
	done

# Every generated table in the READMEs; a test compares.
docs: install
	$(BIN)/python -m spectraqlora_pipelines.reference
	$(BIN)/python -m tests.architectures

# What a GPU machine without a network lacks, into build/gpu; SPECTRAQLORA_TEST_MODEL names a model to take along.
gpu-wheels: install
	$(BIN)/python -m tests.gpu.wheels

# Correctness, speed and memory on a GPU, at most 8 minutes, with that machine's own Python. DEVICE=cpu SMALL=1: dry run.
DEVICE ?= cuda
GPU_PYTHON ?= python3
GPU_CHECK = tests/gpu/check.py --device $(DEVICE) $(if $(SMALL),--small) $(if $(RESULTS),--results $(RESULTS))

ifeq ($(DEVICE),cpu)
gpu-check: install
	$(BIN)/python $(GPU_CHECK)
else
gpu-check:
	$(GPU_PYTHON) $(GPU_CHECK)
endif

clean:
	rm -rf $(VENV) runs build
