"""Rows of an interrupted scan, kept until the table is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectraqlora.files import naming

Row = dict[str, Any]


class ScanJournal:
    """JSON lines of measured rows, each with the digest of the source that it was measured on.

    Rows of another source are not used, nor is a last line that the interruption cut short.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.rows: dict[str, Row] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                document = json.loads(line)
                if document["source"] == source:
                    self.rows[document["row"]["module"]] = document["row"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, row: Row) -> None:
        """Append one row; it is in the file when this returns."""
        self.rows[row["module"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as stream:
            # The line break comes first: after a line that was cut short, this one is still a line of its own.
            stream.write("\n" + json.dumps({"source": self.source, "row": row}))

    def remove(self) -> None:
        """Delete the file: the table that these rows were kept for is written."""
        self.path.unlink(missing_ok=True)
