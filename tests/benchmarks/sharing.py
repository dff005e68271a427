"""What sgm's shared factors save, and what they cost in loss, against hybrid and qlora at several ranks.

    python -m tests.benchmarks.sharing --base-model DIR --data FILE.jsonl --output DIR [--arms NAME,…]

Every arm is trained with every seed on the same rows in the same order, at one learning rate, and scored on the same
held-out rows, which choose nothing: one evaluation, after the last step. Finished runs are kept in OUTPUT/runs.jsonl and
not repeated. Differences to hybrid are paired: across seeds, and by row (the mean over seeds of each row's difference).
"""

from __future__ import annotations

import statistics
from typing import Any

from tests.benchmarks.evidence import SEEDS, Arm, Runs, prepared_study, study_parser

REFERENCE = "hybrid-50, rank 16"


def arms() -> list[Arm]:
    """Hybrid's selection with and without shared factors, and qlora, at several ranks."""
    one_block = {"group_layers": 1}
    listed: list[tuple[str, str, dict[str, Any]]] = [
        *((f"qlora, rank {rank}", "qlora", {"rank": rank, "gradient_init": "on"}) for rank in (16, 8, 6)),
        *((f"hybrid-50, rank {rank}", "hybrid", {"rank": rank}) for rank in (16, 14, 12, 10)),
        *((f"sgm, rank {rank}", "sgm", {"rank": rank}) for rank in (16, 14, 12)),
        *((f"sgm in a block, rank {rank}", "sgm", {"rank": rank} | one_block) for rank in (16, 12)),
        ("sgm with B, rank 16", "sgm", {"group_sides": "both"}),
        ("sgm in whole blocks, rank 16", "sgm", {"group_within": "block", "group_sides": "both"}),
        ("sgm, savings spent", "sgm", {"spend_savings": True}),
        ("sgm by gradient, rank 16", "sgm", {"similarity_of": "gradient"}),
    ]
    return [Arm(name, method, name, select) for name, method, select in listed]


def _losses(run: dict[str, Any]) -> list[float]:
    return [loss / sum(run["row_tokens"]) for loss in run["row_losses"]]


def paired(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean difference in loss, and its standard errors across seeds and by row; runs of equal seeds, in their order."""
    by_seed = [a["eval_loss"] - b["eval_loss"] for a, b in zip(own, other, strict=True)]
    rows = [
        statistics.mean(differences)
        for differences in zip(
            *(
                [x - y for x, y in zip(_losses(a), _losses(b), strict=True)]
                for a, b in zip(own, other, strict=True)
            ),
            strict=True,
        )
    ]
    across = statistics.stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else float("nan")
    return statistics.mean(by_seed), across, statistics.stdev(rows) * len(rows) ** 0.5


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table, the most parameters first."""
    reference = results[REFERENCE]
    parameters = reference[0]["trainable_parameters"]
    lines = []
    for name, own in results.items():
        count = statistics.mean(run["trainable_parameters"] for run in own)
        losses = [run["eval_loss"] for run in own]
        difference, across, by_row = paired(own, reference)
        lines.append(
            (
                -count,
                f"| {name} | {count:,.0f} | {count / parameters - 1:+.1%} | {statistics.mean(losses):.4f} | "
                + (
                    "– |"
                    if name == REFERENCE
                    else f"{difference:+.4f} ± {across:.4f} (rows ± {by_row:.4f}) |"
                ),
            )
        )
    head = [
        "| arm | trained parameters | against hybrid | eval loss | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(line for _, line in sorted(lines))])


def main() -> None:
    parser = study_parser(
        __doc__, steps=60, batch_size=4, max_length=192, rows=2000, compute_dtype="bfloat16", jobs=1
    )
    parser.add_argument(
        "--arms", default="", help=f"names, separated by ;, {REFERENCE!r} among them; empty is all"
    )
    parser.add_argument("--rate", type=float, default=8e-3)
    options = parser.parse_args()
    study = prepared_study(options)
    by_name = {arm.name: arm for arm in arms()}
    names = options.arms.split(";") if options.arms else list(by_name)
    runs = Runs(study, options.jobs)
    wanted = [(name, options.rate, seed, "study") for seed in SEEDS for name in names]
    runs.complete(wanted, by_name)
    known = runs.read()
    text = table({name: [known[name, options.rate, seed, "study"] for seed in SEEDS] for name in names})
    (study.work / "sharing.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
