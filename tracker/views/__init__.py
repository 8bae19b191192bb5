"""Views of a training: live tables, result files, TensorBoard and the histogram page."""
