# make demo: train and evaluate on the digits inside the package.   make test: everything that CI checks.
# PYTHON=python3.12: the interpreter of .venv.   SHORT=1: a shorter demo.   SYSTEM=skip: go on without g++ and OpenBLAS.
SHELL := /bin/bash
BIN := .venv/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import platform as p, sys; sys.exit(not ((3, 10) <= sys.version_info < (3, 14) and \
	(p.system(), p.machine()) != ("Darwin", "x86_64")))' 2>/dev/null && echo $$p && break; done)

# MLX's back-end; the cpu extra asks for nothing on macOS, where Metal comes with mlx
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1 | cut -d. -f1)
BACKEND = $(shell d="$(DRIVER)"; \
	{ [ "$$d" -ge 580 ] && echo cuda13 || { [ "$$d" -ge 550 ] && echo cuda12; } || echo cpu; } 2>/dev/null)

.PHONY: setup setup-dev demo lint test clean

setup: .venv/.ready
setup-dev: .venv/.ready-dev

# Debian and Ubuntu need venv's own package; on a CPU also the compiler that mx.compile calls, and a BLAS 40 times as
# fast as the one in MLX's wheel
.venv/.ready: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "error: needs Python 3.10 to 3.13 (on a Mac, one for Apple silicon): install one," \
		"or name it: make PYTHON=/path/to/python3"; exit 1; }
	@[ "$$(uname)" = Linux ] && [ "$(SYSTEM)" != skip ] || exit 0; \
	missing=$$($(PYTHON) -c 'import ensurepip' 2>/dev/null || echo python3-venv); \
	if [ "$(BACKEND)" = cpu ]; then \
		command -v g++ >/dev/null || missing="$$missing g++"; \
		$(PYTHON) -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null || missing="$$missing libopenblas0"; \
	fi; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } >/dev/null 2>&1 || \
	{ echo "error: missing system packages: sudo apt-get install" $$missing "(SYSTEM=skip goes on without, far slower)"; \
		exit 1; }
	@echo "installing into .venv with $(PYTHON), back-end $(BACKEND)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -e '.[$(BACKEND)]'
	@touch $@

.venv/.ready-dev: .venv/.ready
	@$(BIN)/python -m pip install -q -e '.[$(BACKEND),dev]'
	@touch $@

demo: SHORTER = $(if $(SHORT), --set name=digits_short --set training.epochs=2 --set training.warmup_epochs=0.5)
demo: setup
	$(if $(SHORT),cd "$$(mktemp -d)" && )"$(CURDIR)/$(BIN)/mlx-hjepa" train "$(CURDIR)/configs/digits_demo.yaml"$(SHORTER) && \
		"$(CURDIR)/$(BIN)/mlx-hjepa" eval --knn --linear

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/mypy mlx_hjepa

test: lint
	$(BIN)/python -m pytest
	$(MAKE) demo SHORT=1

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
