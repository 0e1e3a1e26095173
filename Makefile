# `make demo` runs the main job end to end, `make test` passes the tests, `make gpu-check` proves what
# only a GPU can. Each sets up what it needs: a virtual environment in .venv, made with the first
# Python >= 3.12 on PATH or in pyenv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TE := $(VENV)/te/.fetched
# Two workers, which take whole files in the order that tests/support/costs.py gives them.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast gpu-check lint format clean

demo: $(STAMP)
	$(BIN)/python -W ignore examples/demo/run.py

# Tests fork ranks and run on the CPU, whatever the machine has.
test: export CUDA_VISIBLE_DEVICES =
test: $(STAMP) $(TE) lint
	$(BIN)/python -m pytest $(TWO) --durations 25

# Under two minutes: hardly any ranks, no SLURM, no network. See tests/support/costs.py.
test-fast: export CUDA_VISIBLE_DEVICES =
test-fast: export OMP_NUM_THREADS = 1
test-fast: $(STAMP) lint
	$(BIN)/python -m pytest $(TWO) -m "not slow"

# In the environment that trains here: .venv if there is one, else Python as it is.
gpu-check:
	$(or $(wildcard $(BIN)/python),python) -m megatron_infifpo gpu-check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): requirements.txt setup.py
	bash tools/make_venv.sh $(VENV)
	$(BIN)/python -m pip install --no-deps -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

# Transformer Engine's Python at two versions, which tests run on the CPU; out of Python's sight.
$(TE): tests/gpu/fetch_te.sh | $(STAMP)
	bash tests/gpu/fetch_te.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
