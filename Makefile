# Every target does its own set-up, in .venv. Settings: make TARGET NAME=value, or exported.

# the interpreter that makes .venv
PYTHON ?= python3
# what pip installs first: any torch of at least 2.10, with the options that find it
TORCH ?= torch==2.13.0
# overrides of the demo's configuration, such as train.total_steps=2000
DEMO_ARGS ?=
# such as -k objective, or -n 0 for one process
PYTEST_ARGS ?= -n 2 --dist loadscope
# such as --upgrade
LOCK_ARGS ?=
# docker, podman or buildah, and such as --build-arg BASE_IMAGE=...
DOCKER ?= docker
DOCKER_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV := .venv-lock/bin/uv
UV_VERSION := 0.13.9
COMPILE = env -u UV_INDEX_URL -u UV_DEFAULT_INDEX -u UV_EXTRA_INDEX_URL -u UV_INDEX -u UV_FIND_LINKS \
	$(UV) pip compile --quiet --no-config --no-python-downloads --universal --python-version 3.10 --generate-hashes \
	--excludes requirements/excludes.txt --custom-compile-command 'make lock' $(LOCK_ARGS)

.DELETE_ON_ERROR:
.PHONY: help venv test lint demo lock docker clean FORCE

help:
	@echo 'make test    lint and all tests'
	@echo 'make demo    train on handwritten digits and judge the samples: runs/digits/'
	@echo 'make lint    ruff, clang-format, mypy, hadolint'
	@echo 'make venv    the environment of all of these, .venv (PYTHON=$(PYTHON), TORCH=$(TORCH))'
	@echo 'make lock    requirements/*.lock from pyproject.toml (LOCK_ARGS=--upgrade for newer versions)'
	@echo 'make docker  the images: the tests run in one, the other is soflow (DOCKER=$(DOCKER), DOCKER_ARGS)'
	@echo 'make clean   remove the environment and all caches; runs/ stays'

venv: $(VENV)/installed

# Made anew when PYTHON or TORCH is another than last time.
$(VENV)/torch: FORCE
	@set -e; settings='$(PYTHON) $(TORCH)'; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$settings" ]; then \
		$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: PYTHON=$(PYTHON): got Python %d.%d, expected 3.10 or newer" % sys.version_info[:2])'; \
		echo "Making $(VENV) with $(PYTHON) and $(TORCH)"; \
		$(PYTHON) -m venv --clear $(VENV); \
		$(PIP) $(TORCH); \
		echo "$$settings" > $@; \
	fi

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*) requirements/dev.lock requirements/triton.lock
	@echo 'Installing requirements/dev.lock and soflow'
	@$(PIP) --require-hashes -r requirements/dev.lock
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --require-hashes -r requirements/triton.lock
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/*.cpp
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

demo: venv
	$(BIN)/python train.py configs/digits.yaml $(DEMO_ARGS)
	$(BIN)/python -m bench.digits runs/digits

lock: $(UV)
	$(COMPILE) pyproject.toml -o requirements/runtime.lock
	$(COMPILE) pyproject.toml --extra gpu --extra latents -c requirements/runtime.lock -o requirements/gpu.lock
	$(COMPILE) pyproject.toml --extra dev -c requirements/runtime.lock -o requirements/dev.lock
	$(COMPILE) requirements/build.in -o requirements/build.lock
	$(COMPILE) requirements/triton.in -o requirements/triton.lock

$(UV): Makefile
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

docker:
	$(DOCKER) build --target test --build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(DOCKER_ARGS) .
	$(DOCKER) build --target runtime --build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) --tag soflow $(DOCKER_ARGS) .

clean:
	rm -rf $(VENV) .venv-lock build dist soflow.egg-info _soflow_C.*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
