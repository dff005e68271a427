"""The check's results as Markdown, for tests/benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GIB = 2**30
PEER = "peft"
Found = dict[str, Any]


def markdown(found: Found) -> str:
    """Tables of whatever has been found so far."""
    sections = [
        _head(found),
        _outcomes(found),
        _correctness(found),
        _scan(found),
        _training(found),
        _targets(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(found: Found) -> str:
    where = found.get("card", "CPU")
    if "card_bytes" in found:
        where += f" ({found['card_bytes'] / GIB:.0f} GiB, driver {found.get('driver', 'unknown')})"
    versions = ", ".join(f"{name} {number}" for name, number in found.get("versions", {}).items())
    dry = "; tiny shapes: these numbers say nothing about speed" if found.get("small") else ""
    return f"{where}; Python {found.get('python')}, CUDA {found.get('cuda')}, {versions}{dry}."


def _outcomes(found: Found) -> str:
    rows = [
        [name, entry.get("outcome", "running"), _number(entry.get("seconds"), 0)]
        for name, entry in found["parts"].items()
    ]
    return _table(["part", "outcome", "s"], rows)


def _correctness(found: Found) -> str:
    tests = found.get("correctness", {}).get("tests", [])
    rows = [
        [
            test["name"],
            test["outcome"],
            ", ".join(f"{key} {value:.3g}" for key, value in test["numbers"].items()),
        ]
        for test in tests
    ]
    return _table(["what is checked", "outcome", "measured"], rows)


def scan_ratio(found: Found) -> float | None:
    """How many times as long svdvals takes for the matrices of the scan; None before every shape was measured."""
    scan = found.get("scan", {})
    counted = sum(row["matrices"] for row in scan.get("svdvals", []))
    if "scan" not in scan or counted < scan["scan"]["matrices"]:
        return None
    seconds = sum(row["matrices"] * row["seconds"] for row in scan["svdvals"])
    return float(seconds / scan["scan"]["seconds"])


def _scan(found: Found) -> str:
    scan = found.get("scan", {})
    if "scan" not in scan:
        return ""
    own = scan["scan"]
    rows = [
        [
            " x ".join(map(str, row["shape"])),
            row["matrices"],
            _number(row["matrices"] * row["seconds"], 2),
            _gib(row["peak_bytes"]),
            f"{row['relative_difference']:.1e}",
        ]
        for row in scan.get("svdvals", [])
    ]
    ratio = scan_ratio(found)
    times = "" if ratio is None else f"; svdvals takes {ratio:.1f} times as long"
    head = f"SNR scan: {own['matrices']} matrices in {own['seconds']:.2f} s, peak {_gib(own['peak_bytes'])} GiB{times}."
    columns = ["shape", "matrices", "svdvals, s", "its peak, GiB", "snr differs by"]
    return f"{head}\n\n{_table(columns, rows)}" if rows else head


def training_rows(found: Found) -> list[Found]:
    """The trainings that ran, each beside its peer and its plan where there are any."""
    rows = [row for row in found.get("training", {}).get("rows", []) if "seconds" in row]
    peers = {(row["stage"], row["batch"]): row for row in rows if row["side"] == PEER}
    planned = {
        (p["stage"], p["side"], p["batch"]): p["total"] for p in found.get("prepare", {}).get("plans", [])
    }
    result = []
    for row in rows:
        peer, plan = (
            peers.get((row["stage"], row["batch"])),
            planned.get((row["stage"], row["side"], row["batch"])),
        )
        result.append(
            {
                **row,
                "speed": row["tokens_per_second"] / peer["tokens_per_second"] if peer else None,
                "memory": row["peak_bytes"] / peer["peak_bytes"] if peer else None,
                "planned_bytes": plan,
                # Without a card the peak is that of the process, libraries included.
                "plan": plan / row["peak_bytes"] if plan and "card" in found else None,
            }
        )
    return result


def _training(found: Found) -> str:
    columns = [
        "model",
        "batch",
        "side",
        "trained",
        "tokens/s",
        "x peft",
        "peak, GiB",
        "x peft",
        "plan, GiB",
        "plan / peak",
    ]
    rows = [
        [
            row["stage"],
            row["batch"],
            row["side"],
            _number(row["trained_parameters"], 0),
            _number(row["tokens_per_second"], 0),
            _number(row["speed"], 2),
            _gib(row["peak_bytes"]),
            _number(row["memory"], 2),
            _gib(row["planned_bytes"]),
            _number(row["plan"], 2),
        ]
        for row in sorted(training_rows(found), key=lambda row: (row["stage"] != "part", row["batch"]))
    ]
    skipped = [
        f"{row['stage']}, batch {row.get('batch', 'any')}, {row.get('side', 'all sides')}: {row['skipped']}."
        for row in found.get("training", {}).get("rows", [])
        if "skipped" in row
    ]
    plans = {row["stage"]: row["total"] for row in found.get("prepare", {}).get("quantize", [])}
    quantized = [
        f"quantize-load, {row['stage']}: {row['parameters']:,} parameters in {row['seconds']:.1f} s, "
        f"peak {_gib(row['peak_bytes'])} GiB, planned {_gib(plans.get(row['stage']))} GiB."
        for row in found.get("training", {}).get("quantize", [])
    ]
    return "\n\n".join(part for part in (*quantized, _table(columns, rows), *skipped) if part)


def targets(found: Found) -> list[tuple[str, str, bool]]:
    """(target, what was measured at worst, whether it is reached) for the complete model and the scan."""
    rows = [row for row in training_rows(found) if row["stage"] == "complete"]

    def of(side: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["side"] == side and row[key] is not None]

    result = []

    def least(name: str, values: list[float], bound: float) -> None:
        if values:
            result.append((f"{name} at least {bound:g}", f"{min(values):.2f}", min(values) >= bound))

    least("hybrid-25, tokens/s over PEFT's", of("hybrid-25", "speed"), 1.3)
    if memory := of("hybrid-25", "memory"):
        result.append(("hybrid-25, memory over PEFT's at most 0.8", f"{max(memory):.2f}", max(memory) <= 0.8))
    least("qlora, tokens/s over PEFT's", of("qlora", "speed"), 1.0)
    ratio = scan_ratio(found)
    least("svdvals over scan, seconds", [] if ratio is None else [ratio], 10.0)
    if plans := [row["plan"] for row in rows if row["plan"] is not None]:
        inside = min(plans) >= 1.0 and max(plans) <= 1.3
        result.append(("plan over peak from 1 to 1.3", f"{min(plans):.2f} to {max(plans):.2f}", inside))
    return result


def _targets(found: Found) -> str:
    if found.get("small"):
        return ""
    rows = [[name, measured, "yes" if reached else "no"] for name, measured, reached in targets(found)]
    return _table(["target", "measured", "reached"], rows)


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |", *lines])
