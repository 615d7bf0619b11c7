"""Leaves out what cannot run here."""

from importlib.util import find_spec

# Nothing in it applies where no package for quantised models is installed.
collect_ignore = [] if find_spec("bitsandbytes") or find_spec("torchao") else ["test_quantised.py"]
