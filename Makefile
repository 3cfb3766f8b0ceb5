# Each target sets up what it needs. Another interpreter: make PYTHON=python3.12 test
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
BUILD_FILES := pyproject.toml setup.py .ci/setup .ci/constraints.txt $(shell find csrc kernels -type f -not -name '*.pyc')
export PYTHON

.PHONY: demo test test-hosts bench lint sanitize gpu-test gpu-bench gpu-sanitize gpu-profile gpu-wheels clean

demo: $(VENV)/.demo  ## run the main job on real images; writes demo-output/report.html
	$(VENV)/bin/dinofast demo

test: $(VENV)/.dev  ## pass all tests, in as many processes as there are cores, 4 at most, of one thread each
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-hosts: $(VENV)-hosts/.done  ## pass the tests against real anomalib models, in an environment of its own
	$(VENV)-hosts/bin/python -m pytest tests/hosts tests/test_examples.py

bench: $(VENV)/.bench  ## measure against torch, numpy and faiss; results in .benchmarks/
	$(PY) -m pytest bench/

lint: $(VENV)/.dev  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

sanitize: $(VENV)/.dev  ## pass the operators' tests under the address, undefined-behavior and thread sanitizers
	.ci/sanitize $(VENV) address
	.ci/sanitize $(VENV) thread

gpu-test gpu-bench gpu-sanitize gpu-profile: gpu-%:  ## one stage on a machine with a GPU, offline, in 8 minutes
	.ci/gpu $*

gpu-wheels:  ## fetch into wheels/ what a machine with a GPU may lack
	.ci/gpu wheels

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(BUILD_FILES)
	.ci/setup $(VENV) $(patsubst dev,dev$(comma)triton,$(patsubst bench,bench$(comma)demo,$*))
	touch $@

$(VENV)-hosts/.done: $(VENV)/.dev .ci/setup-hosts .ci/hosts.txt
	.ci/setup-hosts $(VENV) $(VENV)-hosts
	touch $@

comma := ,

clean:  ## remove everything that make made
	rm -rf $(VENV) $(VENV)-hosts build dist *.egg-info demo-output .benchmarks dinofast/_native*.so dinofast/_cuda*.so dinofast/_build.json
