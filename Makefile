PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all zoo
setup: .venv/ready

# mmcv asks for opencv-python, which needs a display's libraries; the headless build takes its place.
.venv/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/pip uninstall -q -y opencv-python opencv-python-headless
	$(BIN)/pip install -q -c constraints.txt --no-deps opencv-python-headless
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

zoo: setup
	$(BIN)/python tools/make_zoo.py

test: setup
	$(BIN)/python -m pytest -n auto -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest -n auto
