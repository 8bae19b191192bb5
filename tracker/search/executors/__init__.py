"""Executors: where the trials of a search run."""
