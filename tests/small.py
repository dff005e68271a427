"""Settings whose ranks fit the tests' tiny models."""

from __future__ import annotations

from typing import Any

from spectraqlora.settings import Settings, parse


def small(**sections: Any) -> Settings:
    return parse({"select": {"rank": 8, "rank_high": 8, "rank_low": 4}, **sections})
