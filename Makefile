# Each target works on a fresh clone; what is there already is not made again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo smoke test test-long test-matrix bench figures render lint

setup: .venv/.ready

# Made again when the requirements change.
.venv/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
		|| { echo "error: Python 3.11 to 3.14 is needed, because torch has no packages for others;" \
			"name one with make PYTHON=python3.12" >&2; exit 1; }
	@echo "== set-up: .venv and the packages of requirements.txt (some minutes and up to a few GB the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The tests need more: pytest, ruff, a browser's driver, and every engine that a CPU can run.
.venv/.tests: .venv/.ready tests/requirements.txt requirements-openvino.txt requirements-executorch.txt
	@echo "== set-up: the packages of tests/requirements.txt, with OpenVINO and ExecuTorch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

# Two at a time: much of such a short run is imports, which keep one core busy.
SMALL := --smoke --threads 1 --backends native fbgemm half simulated --batch-sizes 1
MODELS := alexnet resnet18 mobilenetv3
DRAWN := reproduce.py --models mobilenetv3 --backends native fbgemm --batch-sizes 1 --timing brief

demo: setup
	@echo "== MobileNetV3-Small on the drawn images, in FP32 from scratch"
	$(BIN)/python $(DRAWN) --methods fp32
	@$(BIN)/python figures/tables.py --study drawn
	@echo "== the same network in INT8, by post-training quantization"
	$(BIN)/python $(DRAWN) --methods ptq --dtypes int8
	@echo "== figures and table"
	@$(MAKE) --no-print-directory render STUDY=drawn
	@$(MAKE) --no-print-directory smoke MODELS=mobilenetv3

# Every script and the control of every model in MODELS, in small form, but BF16, which not every CPU has.
smoke: setup
	@echo "== the scripts of $(MODELS) in small form: a few images and steps show that each works, and measure nothing"
	@for kind in models quantization; do \
		$(BIN)/python reproduce.py --list --models $(MODELS) $(SMALL) | grep "/$$kind/" | tr '\n' '\0' \
			| PATH="$(CURDIR)/$(BIN):$$PATH" xargs -0 -P 2 -n 1 sh -c || exit 1; \
	done
	$(BIN)/python reproduce.py --models $(MODELS) $(SMALL)

# One study's tables, figures and report.
render:
	@$(BIN)/python figures/all.py --study $(STUDY)

# The tests share the CPUs: threads that spin while they wait would slow each other down.
test: .venv/.tests lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Thousands of random layouts, command lines, runs, weights and accidents, and scripts killed at random moments: more than an hour.
test-long: .venv/.tests
	$(BIN)/python -m pytest -q -n 2 --long tests/trial

# The scripts on the oldest and the newest torch and on each supported Python: half an hour, and up to 30 GB in .venv/matrix.
test-matrix: .venv/.tests
	$(BIN)/python tests/matrix.py

# On drawn images, or on those in the folder DATA.
bench: .venv/.tests
	$(BIN)/python tests/benchmarks/run.py $(if $(DATA),--data '$(DATA)')

# The figures and tables of every study that has results.
figures: setup
	@for study in $$(ls results/*/results.csv 2>/dev/null | xargs -r -n1 dirname | xargs -r -n1 basename); do \
		$(MAKE) --no-print-directory render STUDY=$$study || exit 1; \
	done

lint: .venv/.tests
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && echo "== ruff: clean"
