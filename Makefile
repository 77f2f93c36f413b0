# Every target makes or refreshes .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH := torch==2.14.1 torchvision==0.29.1

.PHONY: demo test lint clean

.venv/installed: setup.cfg pyproject.toml
	command -v $(PYTHON) > /dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -e '.[digits,dev]'
	touch $@

demo: .venv/installed ## stage 1 on the digits, beside a plain autoencoder of the same size and budget
	$(BIN)/python -m datamodules.pack --source digits --output data/digits
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --ckpt_path last
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --config configs/ablation/ae.yaml \
		--experiment digits_ae --ckpt_path last
	$(BIN)/python -m callbacks.run_report runs/digits_tokenizer runs/digits_ae

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv data/digits runs
