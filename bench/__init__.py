"""The benchmark: `python -m bench --help`, from the root of a checkout."""
