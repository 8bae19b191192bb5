"""What people run: `python -m studies.train`."""
