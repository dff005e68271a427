"""GPU memory of the steps for common model sizes, as the README shows it.

    python -m tests.benchmarks.sizes

Default settings but for rows of 2,048 tokens, 4 at a time, and 1 calibration row at a time.
"""

from __future__ import annotations

SETTINGS = {
    "data": {"max_length": 2048},
    "train": {"batch_size": 4, "gradient_accumulation": 2},
    "evaluate": {"batch_size": 4},
    "select": {"calibration_rows": 1},
}
METHODS = ("qlora", "hybrid", "alors", "sgm")


def table() -> str:
    """The Markdown table, GiB."""
    from spectraqlora.planning.shape import ModelShape, config_of
    from spectraqlora.planning.steps import plan
    from spectraqlora.settings import parse

    settings = parse(SETTINGS)
    lines = [
        f"| model | 4-bit weights | {' | '.join(f'train ({m})' for m in METHODS)} | measure-base | "
        "re-evaluate | merge-export |",
        "| --- |" + " --- |" * (4 + len(METHODS)),
    ]
    for name in ("7B", "13B", "65B", "70B"):
        shape = ModelShape(config_of(name), 2)
        steps = plan(shape, settings, cuda=True).steps
        taken = [next(s.device for s in steps if (s.step, s.method) == ("train", m)) for m in METHODS]
        taken += [
            max(s.device for s in steps if s.step == step)
            for step in ("measure-base", "re-evaluate", "merge-export")
        ]
        lines.append(
            f"| {name} | " + " | ".join(f"{b / 2**30:.0f}" for b in [shape.weight_bytes, *taken]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
