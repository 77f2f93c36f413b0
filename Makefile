# Every target makes or refreshes .venv first.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[digits,dev]'
	touch $@

demo: .venv/installed ## stage 1 on the digits, beside a plain autoencoder of the same size and budget
	$(BIN)/python -m datamodules.pack --source digits --output data/digits
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --ckpt_path last
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --config configs/ablation/ae.yaml \
		--experiment digits_ae --ckpt_path last
	$(BIN)/python -m callbacks.compare_runs runs/digits_tokenizer runs/digits_ae

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv data/digits
