"""What is taken from a training: objects in, records or files out."""
