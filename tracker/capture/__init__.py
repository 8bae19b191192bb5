"""What is recorded about a training: pure functions from objects to records or files."""
