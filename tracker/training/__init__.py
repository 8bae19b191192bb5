"""The parts of a training loop; independent of MLflow and Optuna."""
