# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# MLX needs a backend on Linux; on a Mac it brings its own.
ifeq ($(shell uname -s),Linux)
DEMO_EXTRAS := [cpu]
TEST_EXTRAS := [cpu,test]
else
TEST_EXTRAS := [test]
endif

# MLX's Linux wheels bring the reference BLAS, 20 to 60 times slower than OpenBLAS. Where Debian's
# libopenblas0-pthread is installed, it is put in front for tests and benchmarks.
OPENBLAS := $(firstword $(wildcard /usr/lib/*/libopenblas.so.0))
WITH_OPENBLAS := LD_PRELOAD=$(OPENBLAS) OPENBLAS_NUM_THREADS=1

.PHONY: demo demo-model test long bench docs lint types unit wheel clean

demo: $(VENV)/.demo
	@for prompt in 'Sudoku:\n2..563\n536214\n654.3.\n.23645\n4..3.1\n..5.26' 'Sort: 5 2 4 1' 'Count from 12 to 30.'; do \
		echo; printf "> $$prompt\n"; \
		printf "$$prompt" | $(BIN)/mlx_diffgemma.generate --prompt - --seed 7 || exit 1; \
	done
	@echo; echo '> Count the colours. (of mlx_diffgemma/demo/shapes.png)'; \
		$(BIN)/mlx_diffgemma.generate --image mlx_diffgemma/demo/shapes.png --prompt 'Count the colours.' --seed 7
	@echo; echo 'It is small: mlx_diffgemma/demo/README.md says what it knows, and how well.'

# The wheel takes one core, and waits for downloads, while the tests run.
test: lint types
	$(MAKE) -j 2 wheel unit

# Measures speed against mlx-vlm and transformers, about two hours on two cores.
bench: $(VENV)/.bench
	$(WITH_OPENBLAS) $(BIN)/python bench/answer.py --save
	$(WITH_OPENBLAS) $(BIN)/python bench/answer.py --model recipes/steps/bench-model --limit 100 --save
	for name in counts sparse step prefill growth twin floors infill cache decide structured rows serve; do \
		LD_PRELOAD=$(OPENBLAS) $(BIN)/python bench/$$name.py --save; \
	done
	LD_PRELOAD=$(OPENBLAS) $(BIN)/python bench/growth.py --peak --save
	$(BIN)/python bench/table.py --write

# What is too long for every change: deliberate faults, fuzzing, kills, soaks, and drawn cases in full
# counts, each script saying what it shows; the package installed with pip, uv and pipx on every
# Python here. TOKENIZER=FOLDER and CASES=FILE: a checkpoint's tokenizer, under given schemas.
long: $(VENV)/.test
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.convert.fuzz
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.convert.kills
	$(BIN)/python -m tests.language.damaged
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.denoise.mixtures
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.denoise.mixtures --doubles
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.denoise.conversations
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.denoise.store_kills
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.engine.soak
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.constraint.cases --count 3000
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.write.constrained_runs
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.batch.kills
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.bad_requests
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.soak
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.structured $(if $(CASES),--cases $(CASES))
	$(if $(TOKENIZER),$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.structured --tokenizer $(TOKENIZER) $(if $(CASES),--cases $(CASES)))
	$(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.write.merged_tokens $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(if $(CASES),--cases $(CASES))
	$(BIN)/python -m tests.constraint.patterns
	$(BIN)/python tests/check_installs.py

# Writes the pages and the picture that are made from the code.
docs: $(VENV)/.test
	$(BIN)/python docs/reference.py --write
	$(BIN)/python docs/picture.py --write
	$(BIN)/python bench/table.py --write

# Makes the bundled model from nothing, about four and a half hours on two cores; run again, it goes on.
demo-model: $(VENV)/.test
	$(BIN)/python recipes/bundled/make.py --folder build/bundled

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# A few processes, one core each. Hundreds of tests start a command: its imports are compiled once.
unit: $(VENV)/.test
	PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/bytecode $(WITH_OPENBLAS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Built, installed in another environment with the runtime dependencies only, and run from another folder.
wheel: $(VENV)/.test
	$(BIN)/python tests/check_wheel.py

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.$(DEMO_EXTRAS)'
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.$(TEST_EXTRAS)'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
