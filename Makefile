# `make demo` and `make test` include all the set-up; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPTS := --prompt "a noto emoji of Santa Claus, medium skin tone" --prompt "a twemoji emoji of red apple" \
	--prompt "a noto emoji of flag of Japan" --prompt "a twemoji emoji of dog face" \
	--prompt "a noto emoji of woman surfing, dark skin tone" --prompt "a twemoji emoji of fire engine"

.PHONY: demo test lint suite test-fast pictures mutation reliability clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	@echo "== Training a small denoiser from scratch on the embedded pictures (the loss falls)"
	rm -rf runs/demo
	$(BIN)/python ldm/train.py --config configs/demo.yaml
	@echo "== Drawing six prompts with the weights that this project trained"
	$(BIN)/python txt2img.py $(PROMPTS) --seed 7 --outdir outputs/demo
	@echo "== The pictures are in outputs/demo, what this short training draws in runs/demo/samples"

test: lint suite

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

# Two processes of one thread each: for tensors as small as these, one process of two threads takes twice the time. The
# files that start processes come first, because they take longest. A part: make suite TESTS="tests/data tests/vae"
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
TESTS := tests/test_*.py tests/[a-z]*/
suite: $(VENV)/installed-dev
	$(PYTEST) $(TESTS)

# Fast tests from most of the folders, to run while writing.
FAST := tests/test_structure.py tests/test_mathematics.py tests/test_project_files.py tests/ldm/files tests/ldm/diffusion \
	tests/ldm/denoisers tests/ldm/test_config.py tests/ldm/test_config_data.py \
	$(foreach name,guidance single_step time_grids,tests/ldm/samplers/test_$(name).py) \
	$(foreach name,ema loss_scale lr_schedule muon optimizers,tests/ldm/training/optim/test_$(name).py) \
	$(foreach name,bad_samples config mixture order quarantine samples shards tar,tests/data/test_$(name).py)
test-fast: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(PYTEST) $(FAST)

# The pictures of docs/mathematics.md and docs/drawing.md: seconds.
pictures: $(VENV)/installed-dev
	$(BIN)/python docs/mathematics_pictures.py
	$(BIN)/python docs/editing_picture.py

# Change each coefficient of the mathematics, one at a time, and list the changes that no test notices: hours. Each part is
# tried on the tests that are quickest to notice.
MUTATE := $(BIN)/python benchmarks/mutation.py
SAMPLERS := tests/ldm/samplers/test_
mutation: $(VENV)/installed-dev
	$(MUTATE) --target ldm/samplers/guidance.py ldm/samplers/likelihood.py --tests $(SAMPLERS)guidance.py \
		$(SAMPLERS)likelihood.py
	$(MUTATE) --target ldm/training/optim/averages.py \
		--tests tests/ldm/training/optim/test_ema.py tests/ldm/training/optim/test_power_profile.py
	$(MUTATE) --target ldm/diffusion --tests tests/ldm/diffusion $(SAMPLERS)published.py $(SAMPLERS)single_step.py \
		$(SAMPLERS)time_grids.py
	$(MUTATE) --target ldm/samplers/time_grids.py --tests $(SAMPLERS)time_grids.py $(SAMPLERS)k_diffusion.py \
		$(SAMPLERS)against_diffusers.py
	$(MUTATE) --target $(foreach name,__init__ steps single_step multistep linear_multistep k_diffusion,ldm/samplers/$(name).py) \
		--tests $(foreach name,single_step published k_diffusion against_diffusers order names contract mixture,$(SAMPLERS)$(name).py)
	$(MUTATE) --target ldm/samplers/stock --tests $(SAMPLERS)stock_grids.py $(SAMPLERS)stock_against_diffusers.py

# All measurements of docs/reliability.md: two hours.
reliability: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/reliability_data.py --plans 10000 --shards 2000
	$(BIN)/python benchmarks/reliability_checkpoints.py --damages 1000 --points
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reliability_readers.py --stops 100
	$(BIN)/python benchmarks/reliability_storage.py --runs 60
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reliability.py --kills 200 --points 200 --signals 50 --hangs 10 --ranks 2 \
		--disks 10
	$(BIN)/python benchmarks/engine_overhead.py

clean:
	rm -rf $(VENV) build *.egg-info
