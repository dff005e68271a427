"""Which method, signal and start earn their parameters: a study with several seeds, resumable.

    python -m tests.benchmarks.evidence --base-model DIR --data FILE.jsonl --output DIR

For every arm a learning rate is chosen on rows of its own (or taken from the arm that `arms.py` names); then it is
trained with every seed on the same rows in the same order as the others. Held-out rows choose the checkpoint, test
rows are reported. Runs are kept in OUTPUT/runs.jsonl and not repeated; OUTPUT/results.json has the raw results so far,
of which `python -m tests.benchmarks.evidence.tables` makes the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.benchmarks.evidence.arms import TABLES, arms
from tests.benchmarks.evidence.runs import SEEDS, Runs
from tests.benchmarks.evidence.study import Study
from tests.benchmarks.evidence.tables import Results, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data", required=True, type=Path, help=".jsonl with prompts and answers")
    parser.add_argument("--test-data", type=Path, help="test rows; none: the last tenth of --data")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--task", required=True, help="what tables call the data")
    parser.add_argument("--tables", default="arms,curve,sharing", help=f"which arms: {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=192, help="tokens; longer rows are dropped")
    parser.add_argument("--eval-rows", type=int, default=32, help="held-out rows, at most")
    parser.add_argument("--test-rows", type=int, default=120, help="before those that are too long")
    parser.add_argument("--compute-dtype", default="bfloat16", help="faster on CPUs with AMX than float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    options = parser.parse_args()
    study = Study(
        options.base_model,
        options.output,
        options.steps,
        options.batch_size,
        options.max_length,
        options.compute_dtype,
    )
    study.prepare(options.data, options.test_data, options.eval_rows, options.test_rows)
    about = {
        "model": Path(options.base_model).name,
        "task": options.task,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "rows": study.account(),
        **study.base_scores(),
    }
    (options.output / "about.json").write_text(json.dumps(about), encoding="utf-8")
    names = options.tables.split(",")
    by_name = arms(names)
    runs = Runs(study, arms(list(TABLES)), options.jobs)
    rates = runs.rates(dict.fromkeys(arm.tuned_as for arm in by_name.values()))
    # One seed of a table before the next of any: a study that is cut off has complete tables of fewer seeds.
    for seed in SEEDS[: options.seeds]:
        runs.compare(by_name, rates, seed)
    results = Results.read(str(options.output / "results.json"))
    for name in names:
        print(f"\n{name}\n\n{table(TABLES[name], [results])}")


if __name__ == "__main__":
    main()
