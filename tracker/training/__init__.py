"""What a training loop needs; knows neither MLflow nor Optuna."""
