"""Command line programs: `python -m studies.train` and its siblings."""
