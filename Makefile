# make demo      install, sample from the shipped weights, train from scratch for about a minute
# make test      install, lint, type checks, the whole test suite
# make test-gpu  the kernels' tests at real sizes, on a machine with a GPU
# make bench     measure against naive implementations on a CPU, against DiT on a GPU
# make performance  write docs/performance.md from the records in benchmarks/results/
# make scaling   refit `lamamba plan` to the records of benchmarks/scaling.py, and write docs/scaling.md
# make docs      build the site to site/, and check its links
# make figures   draw the figures and write the tables of docs/network.md and docs/imagenet.md
# make package   build wheel and sdist into dist/, and try the wheel in an empty environment; TESTS=1 runs all tests there
# make clean     remove everything that these commands made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu bench performance scaling docs figures package lint clean

# torch goes first and alone: a range would let pip choose a build with gigabytes of CUDA.
$(BIN)/lamamba: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

demo: $(BIN)/lamamba
	rm -rf demo
	$(BIN)/lamamba sample nano-4-steps --labels 0,1,2,3,4,5,6,7,8,9 --num-per-label 4 --out demo/shipped.png
	$(BIN)/lamamba train --preset nano --data builtin --out demo/run --num-images 1536 --batch-size 32 \
		--learning-rate 0.001 --log-every 64 --sample-every 1536 --sample-steps 10 --checkpoint-every 1536
	@echo
	@echo "sampled with the shipped weights:   demo/shipped.png"
	@echo "a minute of training from scratch:  demo/run/loss.png, demo/run/samples/"
	@echo "A minute on a CPU is enough to see the loss fall. Recognizable clothes take several hundred thousand images."
	@echo
	@echo "To use the command lamamba in this shell:  source $(VENV)/bin/activate"

lint: $(BIN)/lamamba
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --durations=10

test-gpu: $(BIN)/lamamba
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU that PyTorch can use'"
	$(BIN)/python -m pytest -n auto tests/ops tests/test_on_gpu.py

bench: $(BIN)/lamamba
	$(BIN)/python benchmarks/run.py

performance: $(BIN)/lamamba
	$(BIN)/python benchmarks/report.py

scaling: $(BIN)/lamamba
	$(BIN)/python benchmarks/scaling_report.py

docs: $(BIN)/lamamba
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(BIN)/lamamba
	$(BIN)/python docs/make/draw.py

package: $(BIN)/lamamba
	PYTHON=$(BIN)/python .ci/package $(if $(TESTS),--tests)

clean:
	rm -rf $(VENV) demo dist site
