"""The runner: a plan of runs, workers that execute it, a directory that survives interruption."""
