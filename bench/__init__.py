"""Benchmarks of the tracker and its peers: `python -m bench.overhead`, and others."""
