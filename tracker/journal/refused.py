"""Records that the store refused, kept next to the journals so that nothing is deleted."""

from __future__ import annotations

import json
from pathlib import Path

from tracker.journal.database import restrict
from tracker.journal.reader import Journal
from tracker.journal.records import Entry, File, Invalid, Model, encode

REFUSED = "refused"
"""The folder for refused records, next to the journals, with a subfolder per journal."""


def set_aside(journal: Journal, entry: Entry, reason: str) -> Path | None:
    """Keep a record that the store refused, with its file.

    Args:
        journal: The journal of the record.
        entry: The record.
        reason: Why it was refused.

    Returns:
        The folder that holds it; None if it is not a record, or the folder cannot be written.
    """
    if isinstance(entry.record, Invalid):
        return None
    folder = journal.folder.parent / REFUSED / journal.folder.name
    line = {
        "run": entry.run,
        "run_id": journal.run_id(entry.run),
        "time": entry.time,
        "reason": reason,
        "kind": entry.record.kind,
        "record": json.loads(encode(entry.record)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.record, File | Model):
            path = journal.staged(entry.record.staged)
            if path is not None and path.exists():
                line["file"] = f"{path.parent.name}/{path.name}"
                path.parent.rename(folder / path.parent.name)
        with (folder / "records.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        restrict(folder)
    except OSError:
        return None
    return folder
