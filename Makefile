# `make demo` trains a small model and shows what came of it; `make test` checks everything. Both install what they
# need into .venv first. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV := HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=true
LAUNCH := $(ENV) $(BIN)/accelerate launch --config_file scripts/accelerate_configs/single.yaml

.PHONY: demo test test-slow lint install clean
.DEFAULT_GOAL := demo

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; try: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	$(LAUNCH) scripts/train_llm.py --preset tiny --train_tokens 1500000 --track_manifold true \
		--output_dir results/demo --overwrite_output_dir
	$(BIN)/python scripts/track_manifold.py --plot_only --run results/demo --report
	$(BIN)/python scripts/generate.py --model results/demo --prompt "My fellow citizens,"

test: install lint
	$(ENV) $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: install
	$(ENV) $(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
