# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test check wheel clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/ready
	rm -rf out/demo out/demo.partial
	$(VENV)/bin/quantize-model run --output out/demo
	@echo "Open out/demo/report.html in a browser."

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

check: $(VENV)/ready
	$(VENV)/bin/ruff check sinkquant evals tests
	$(VENV)/bin/mypy

wheel: $(VENV)/ready
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf $(VENV) out dist build
