"""What tracking costs, beside peers: `python -m bench.overhead`."""
