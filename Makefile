# Everything happens in .venv, which `make install` makes. See README.md.
python := .venv/bin/python

.PHONY: install demo test test-full lint update

install:
	@scripts/install

demo: install ## the main job on this machine: Selfie's loop in the embedded setting
	$(python) -m align_loop +experiment=selfie_iter4

test: install lint ## at most 20 minutes
	$(python) -m pytest -m "not full"

test-full: install ## at most 50 minutes; installs SLURM where it is missing (Debian or Ubuntu, root)
	scripts/local_slurm install
	$(python) -m pytest -m full

lint: install
	.venv/bin/ruff check align_loop tests scripts

update: install ## newer versions within the pinned ranges, then the contract tests
	$(python) -m pip install --upgrade --upgrade-strategy eager -e '.[dev]'
	$(python) -m pytest tests -k "engines or trainers"
