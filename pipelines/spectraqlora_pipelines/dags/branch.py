"""One method's branch: select-layers, then train and re-evaluate for every round."""

from typing import Any, NamedTuple

from kfp import dsl
from spectraqlora.steps.re_evaluate.component import re_evaluate
from spectraqlora.steps.select_layers.component import select_layers
from spectraqlora.steps.start_point.component import start_point
from spectraqlora.steps.train.component import train

from spectraqlora_pipelines.dags.placement import Placement


class Branch(NamedTuple):
    evaluation: dsl.Metrics
    adapter: dsl.Model


def branch_of(name: str, rounds: int, place: Placement, from_champion: bool = False) -> Any:
    """The nested pipeline of one method: select-layers, then train and re-evaluate for every round.

    Args:
        name: the method.
        rounds: unrolled.
        place: names and places the tasks.
        from_champion: whether the first round starts from the champion's adapter where it fits.
    """

    @dsl.pipeline(name=f"branch-{name}", description=f"select-layers, train and re-evaluate for {name}")
    def branch(
        method: str,
        run_key: str,
        seed: int,
        snr: dict,
        select: dict,
        train_settings: dict,
        evaluate: dict,
        tracking: dict,
        checkpoint: dict,
        quantized: dsl.Input[dsl.Model],
        data: dsl.Input[dsl.Dataset],
        table: dsl.Input[dsl.Dataset],
    ) -> Branch:
        chosen = select_layers(
            method=method, settings=select, seed=seed, quantized=quantized, data=data, table=table
        )
        place(chosen, f"select-layers ({name})")
        ranks: Any = chosen.outputs["ranks"]
        carried: dict[str, Any] = {}
        if from_champion:
            begun = start_point(tracking=tracking, ranks=ranks)
            place(begun, f"start-point ({name})")
            ranks, carried = begun.outputs["start_ranks"], {"start": begun.outputs["start_adapter"]}
        judged: Any = None
        for number in range(1, rounds + 1):
            trained = train(
                run_key=run_key,
                round=number,
                rounds=rounds,
                settings=train_settings,
                evaluate=evaluate,
                tracking=tracking,
                checkpoint=checkpoint,
                seed=seed,
                quantized=quantized,
                data=data,
                ranks=ranks,
                **carried,
            )
            place(trained, f"train ({name}, round {number})")
            before = {"previous": judged.outputs["evaluation"]} if judged else {}
            judged = re_evaluate(
                run_key=run_key,
                settings=evaluate,
                select=select,
                snr=snr,
                tracking=tracking,
                seed=seed,
                quantized=quantized,
                data=data,
                ranks=ranks,
                adapter=trained.outputs["adapter"],
                **before,
            )
            place(judged, f"re-evaluate ({name}, round {number})")
            ranks, carried = judged.outputs["next_ranks"], {"previous": judged.outputs["next_adapter"]}
        return Branch(evaluation=judged.outputs["evaluation"], adapter=trained.outputs["adapter"])

    return branch
