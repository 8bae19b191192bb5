"""The documentation's code runs, and the commands, files and links in it exist."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from models import RECIPES
from models.recipe import Source
from tests.helpers import Store

ROOT = Path(__file__).parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"  # names commands that were removed
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", CHANGELOG, ROOT / "bench/README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def python_block(page: Path, marker: str) -> str:
    """The one Python block of a page that contains `marker`."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (block,) = [block for block in blocks if marker in block]
    return str(block)


def run_as_script(code: str) -> dict[str, Any]:
    """Run pasted code as a separate script, and return its global names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)
    return names


def code_lines(page: Path) -> list[str]:
    """The lines of a page that a reader may paste: code blocks, indented or fenced, and spans."""
    text = page.read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    indented = re.findall(r"^    (\S.*)$", text, re.M)
    spans = re.findall(r"`([^`\n]+)`", text)
    return [line.strip() for block in fenced for line in block.splitlines()] + indented + spans


def commands(*pages: Path) -> list[list[str]]:
    """The words of each command of this project that the pages name."""
    ours = re.compile(r"(python -m (studies|bench|tracker)\b|tracker [a-z]).*")
    lines = [line for page in pages for line in code_lines(page) if ours.fullmatch(line)]
    return [list(words) for words in sorted({tuple(shlex.split(x, comments=True)) for x in lines})]


def test_the_tutorial_loop_in_the_readme_tracks_every_combination(store: Store) -> None:
    run_as_script(python_block(ROOT / "README.md", "RunBuilder.get_runs"))
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 4
    assert Path("results.csv").exists()


def test_the_fresh_start_in_the_readme_tracks_one_run(store: Store) -> None:
    run_as_script(python_block(ROOT / "README.md", "with start_run"))
    (run,) = store.runs("digits")
    assert run.info.status == "FINISHED"
    assert {"loss", "accuracy", "epoch_duration"} <= set(run.data.metrics)
    assert len(run.outputs.model_outputs) == 1


def test_the_search_in_the_readme_runs_the_grid_in_forty_lines(store: Store) -> None:
    search = python_block(ROOT / "README.md", "Study(")
    assert len(search.splitlines()) <= 40
    run_as_script(search)
    runs = store.runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 9
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 8


def test_the_recipe_in_the_models_page_builds_a_network_for_its_data() -> None:
    recipe = run_as_script(python_block(ROOT / "docs/models.md", "Recipe("))["RECIPE"]
    params = recipe.defaults()
    data = recipe.load(Source("digits", "nowhere", 0), params)
    inputs, _ = data.train[0]
    assert recipe.build(params, data.facts)(inputs[None]).shape == (1, 10)


def test_the_readme_names_at_most_twelve_commands() -> None:
    section = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.S)
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert 0 < len(lines) <= 12


@pytest.mark.parametrize("words", commands(*set(PAGES) - {CHANGELOG}), ids=" ".join)
def test_a_documented_command_exists_with_its_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, given = ("tracker.cli", words[1:]) if words[0] == "tracker" else (words[2], words[3:])
    chosen = given[:1] if module == "tracker.cli" else []
    if "--model" in given and (model := given[given.index("--model") + 1]) in RECIPES:
        chosen = ["--model", model]
    monkeypatch.setattr(sys, "argv", [module, *chosen, "--help"])
    with pytest.raises(SystemExit) as stopped:
        import_module(module).main()
    assert stopped.value.code == 0
    known = capsys.readouterr().out
    assert [word for word in given if word.startswith("--") and f"{word} " not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_documented_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for line in code_lines(page) for target in re.findall(r"^make (\w+)", line)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), f"{target}#{anchor}"
    for name in re.findall(
        r"`([a-z_/]+/[a-z_]+\.py|(?:tracker|models|studies|tests)/[a-z_/]*)`", text
    ):
        assert (ROOT / name).exists() or (ROOT / "tracker" / name).exists(), name


def headings(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_layout_in_the_design_page_lists_every_module() -> None:
    text = (ROOT / "docs/design.md").read_text()
    layout = text.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    listed: set[str] = set()
    folders: list[str] = []
    for line in layout.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        del folders[len(indent) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            listed.add("".join(folders) + name)
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tracker").rglob("*.py")
        if path.name not in ("__init__.py", "_version.py")
    }
    assert {name for name in listed if name.startswith("tracker/") and name.endswith(".py")} == (
        modules
    )
