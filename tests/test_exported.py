"""A crafted `.pt2` file is refused before anything in it runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tracker.exported import load_exported


class Crafted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    exported = torch.export.export(
        nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    torch.export.save(exported, path := tmp_path / "model.pt2")
    return path


def rewritten(program: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive whose members `change` changes."""
    crafted = program.with_name("crafted.pt2")
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(crafted, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return crafted


def test_an_exported_program_is_loaded(program: Path) -> None:
    loaded = load_exported(program).module()

    assert loaded(torch.ones(7, 3)).shape == (7, 2)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_crafted_example_inputs_run_nothing(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def change(name: str, content: bytes) -> bytes:
        if "sample_inputs" not in name:
            return content
        torch.save(Crafted(mark), buffer := io.BytesIO())
        return buffer.getvalue()

    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_exported(rewritten(program, change))
    assert not mark.exists()


def test_crafted_weights_run_nothing(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            config = json.loads(content)
            for entry in config["config"].values():
                entry["use_pickle"] = True
            return json.dumps(config).encode()
        if Path(name).name.startswith("weight_"):
            torch.save(Crafted(mark), buffer := io.BytesIO())
            return buffer.getvalue()
        return content

    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_exported(rewritten(program, change))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["opaque_obj_0", "custom_obj_0"])
def test_pickled_objects_are_refused(name: str, program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr(f"model/data/constants/{name}", pickle.dumps(Crafted(mark)))

    with pytest.raises(ValueError, match="which may run code"):
        load_exported(program)
    assert not mark.exists()


@pytest.mark.parametrize("code", ["exec(chr(120))", "().__class__", "s0.f", "open('x')"])
def test_code_in_place_of_a_size_is_refused(code: str, program: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(".json") or b'"expr_str"' not in content:
            return content
        document = json.loads(content)

        def walk(value: object) -> None:
            for item in value.values() if isinstance(value, dict) else value:  # type: ignore
                if isinstance(item, (dict, list)):
                    walk(item)
            if isinstance(value, dict) and "expr_str" in value:
                value["expr_str"] = code

        walk(document)
        return json.dumps(document).encode()

    with pytest.raises(ValueError, match="which may run code"):
        load_exported(rewritten(program, change))
