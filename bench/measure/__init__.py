"""How it is measured: processes, rounds, float64, the files of results."""
