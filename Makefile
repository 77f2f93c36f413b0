# Every target except submit and clean creates or refreshes .venv first.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin

.PHONY: demo study bench test test-cluster lint submit clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[digits,dev]'
	touch $@

demo: .venv/installed ## all stages on the digits: tokenizer (beside a plain autoencoder), decoder, latents, diffusion, samples
	$(BIN)/python -m datamodules.pack --source digits --output data/digits
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --ckpt_path last
	$(BIN)/python main.py fit --config configs/experiment/digits_tokenizer.yaml --config configs/ablation/ae.yaml \
		--experiment digits_ae --ckpt_path last
	$(BIN)/python main.py fit --config configs/experiment/digits_decoder.yaml --ckpt_path last
	$(BIN)/python main.py predict --config configs/experiment/digits_latents.yaml
	$(BIN)/python main.py fit --config configs/experiment/digits_sit.yaml --ckpt_path last
	$(BIN)/python main.py predict --config configs/experiment/digits_samples.yaml
	$(BIN)/python main.py predict --config configs/experiment/digits_samples.yaml \
		--experiment digits_samples_unguided --model.init_args.sampling.guidance_scale 1.0
	$(BIN)/python -m tools.compare_runs runs/digits_tokenizer runs/digits_ae runs/digits_decoder
	$(BIN)/python -m tools.demo_report

study: .venv/installed
	$(BIN)/python -m tools.study --profile $(or $(PROFILE),quick)

bench: .venv/installed ## the suite's speed beside a plain version of the same networks, a few minutes; FULL=1 for all
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(if $(FULL),--full)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-cluster: .venv/installed ## a real two-node Slurm on this machine; installs Debian's slurm-wlm and munge if they are missing
	tests/cluster/install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

NODES := 1
GPUS := # per node
TASKS := $(or $(GPUS),1)# processes per node
TIME := 24:00:00
submit: ## one run on a Slurm cluster; see slurm/fit.sbatch
	@test -n "$(CONFIG)" || { echo "make submit CONFIG=configs/experiment/E.yaml [NODES=1] [GPUS=8 per node, or TASKS=1]" \
		"[TIME=24:00:00] [NAME=run] [SBATCH='--partition=p ...'] [ARGS='--config f ...']" >&2; exit 1; }
	mkdir -p runs/slurm
	sbatch --job-name=$(or $(NAME),$(basename $(notdir $(CONFIG)))) --nodes=$(NODES) --ntasks-per-node=$(TASKS) \
		$(GPUS:%=--gpus-per-node=%) --time=$(TIME) $(SBATCH) slurm/fit.sbatch --config $(CONFIG) $(ARGS)

clean:
	rm -rf .venv data/digits*
