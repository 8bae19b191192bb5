"""Optuna's own first example, a simple quadratic function, with each trial as a run."""

import optuna

from tracker import tracked


def objective(trial: optuna.Trial) -> float:
    """Return a value that is smallest, -1, at x = 0 and y = -1."""
    x = trial.suggest_float("x", -100, 100)
    y = trial.suggest_categorical("y", [-1, 0, 1])
    return x**2 + y


if __name__ == "__main__":
    study = optuna.create_study()
    study.optimize(tracked(objective, experiment="optuna simple"), n_trials=10)
    print(f"Best value: {study.best_value} (params: {study.best_params})")  # noqa: T201

    # We can continue the optimization as follows.
    study.optimize(tracked(objective, experiment="optuna simple"), n_trials=20)
    print(f"Best value: {study.best_value} (params: {study.best_params})")  # noqa: T201
