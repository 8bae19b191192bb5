"""Runs read from MLflow, one by one or by a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow.entities import Run

from tracker.errors import StoreError
from tracker.store.client import LATER_PARAM, PLACEHOLDER_TAG, MlflowStore
from tracker.store.guards import all_pages, translated

_PAGE = 1_000  # runs in an answer


@dataclass(frozen=True)
class RunSnapshot:
    """A run as MLflow has it."""

    run_id: str
    experiment_id: str
    status: str
    """One of MLflow's: RUNNING, SCHEDULED, FINISHED, FAILED, KILLED."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    """The latest values; see LATER_PARAM."""
    metrics: Mapping[str, float]
    """The last value of each, which may be NaN."""
    models: Sequence[str]
    """The ids of the models that the run logged."""

    @property
    def is_placeholder(self) -> bool:
        """Whether another process made the run in advance, and its own process may replace it."""
        return PLACEHOLDER_TAG in self.tags

    @property
    def is_open(self) -> bool:
        """Whether the process that tracks the run may still deliver records."""
        return self.status == "RUNNING" and not self.is_placeholder


def read_run(store: MlflowStore, run_id: str) -> RunSnapshot:
    """Read one run.

    Raises:
        StoreError: The run does not exist, or the store cannot be used.
    """
    with translated(f"read run {run_id}"):
        return _snapshot(store.client.get_run(run_id))


def runs_by_tag_prefix(store: MlflowStore, tag: str, prefix: str) -> dict[str, RunSnapshot]:
    """Find the runs of all experiments in which a tag's value begins with a prefix.

    Args:
        store: The store to search.
        tag: The tag's name.
        prefix: The beginning of its value, without `%` and quotes.

    Returns:
        The runs by the tag's value.
    """
    with translated("search runs"):
        runs = all_pages(
            store.client.search_runs,
            store.experiment_ids(),
            f"tags.`{tag}` LIKE '{prefix}%'",
            max_results=_PAGE,
        )
        return {run.data.tags[tag]: _snapshot(run) for run in runs}


def finished_runs(store: MlflowStore, experiment: str) -> list[RunSnapshot]:
    """Return the FINISHED runs of an experiment, oldest first.

    Raises:
        StoreError: The experiment does not exist.
    """
    with translated(f"read the experiment {experiment!r}"):
        entity = store.client.get_experiment_by_name(experiment)
        if entity is None:
            raise StoreError(f"experiment={experiment!r} does not exist.")
        runs = all_pages(
            store.client.search_runs,
            [entity.experiment_id],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time ASC"],
            max_results=_PAGE,
        )
        return [_snapshot(run) for run in runs]


def _snapshot(run: Run) -> RunSnapshot:
    tags = dict(run.data.tags)
    later = {
        name.removeprefix(LATER_PARAM): value
        for name, value in tags.items()
        if name.startswith(LATER_PARAM)
    }
    outputs = run.outputs.model_outputs if run.outputs else []
    return RunSnapshot(
        run_id=str(run.info.run_id),
        experiment_id=str(run.info.experiment_id),
        status=str(run.info.status),
        tags=tags,
        params={**run.data.params, **later},
        metrics=dict(run.data.metrics),
        models=[output.model_id for output in outputs],
    )
