# The two commands of the README; both make the environment they need and are safe to repeat.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: test demo clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[export,test]'
	touch $@

test: $(STAMP)
	$(VENV)/bin/python -m pytest tests -n 2 --dist loadfile -m "not gpu"

demo: $(STAMP)
	$(VENV)/bin/python examples/minilm.py

clean:
	rm -rf $(VENV) .demo build dist *.egg-info
