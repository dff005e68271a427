"""One method's branch: select-layers, then train and re-evaluate for every round."""

from typing import Any, NamedTuple

from kfp import dsl
from spectraqlora.methods import catalogue
from spectraqlora.steps.re_evaluate.component import re_evaluate
from spectraqlora.steps.select_layers.component import select_layers
from spectraqlora.steps.start_point.component import start_point
from spectraqlora.steps.train.component import train

from spectraqlora_pipelines.dags.placement import Placement


class Branch(NamedTuple):
    evaluation: dsl.Metrics
    adapter: dsl.Model


def unrolled(name: str, rounds: int) -> int:
    """How many rounds of train and re-evaluate a method's branch has; one where its rank map never moves."""
    return rounds if catalogue.method(name).moves else 1


def branch_of(name: str, rounds: int, place: Placement, from_champion: bool = False) -> Any:
    """The nested pipeline of one method: select-layers, then train and re-evaluate for every round.

    Args:
        name: the method.
        rounds: whose steps are trained, one after the other or all in one.
        place: names and places the tasks.
        from_champion: whether the first round starts from the champion's adapter where it fits.
    """

    @dsl.pipeline(name=f"branch-{name}", description=f"select-layers, train and re-evaluate for {name}")
    def branch(
        method: str,
        seed: int,
        snr_settings: dict,
        select_settings: dict,
        train_settings: dict,
        evaluate_settings: dict,
        tracking_settings: dict,
        checkpoint_settings: dict,
        outline: dsl.Input[dsl.Artifact],
        four_bit: dsl.Input[dsl.Model],
        rows: dsl.Input[dsl.Dataset],
        table: dsl.Input[dsl.Dataset],
        measurement: dsl.Input[dsl.Metrics],
    ) -> Branch:
        selected = select_layers(
            method=method,
            select_settings=select_settings,
            seed=seed,
            outline=outline,
            table=table,
            measurement=measurement,
        )
        place(selected, f"select-layers ({name})")
        rank_map: Any = selected.outputs["rank_map"]
        carried: dict[str, Any] = {}
        if from_champion:
            start = start_point(tracking_settings=tracking_settings, rank_map=rank_map)
            place(start, f"start-point ({name})")
            rank_map, carried = start.outputs["start_rank_map"], {"start": start.outputs["start_adapter"]}
        evaluated: Any = None
        for number in range(1, unrolled(name, rounds) + 1):
            trained = train(
                round=number,
                rounds=rounds,
                train_settings=train_settings,
                evaluate_settings=evaluate_settings,
                tracking_settings=tracking_settings,
                checkpoint_settings=checkpoint_settings,
                seed=seed,
                four_bit=four_bit,
                rows=rows,
                rank_map=rank_map,
                **carried,
            )
            place(trained, f"train ({name}, round {number})")
            before = {"previous": evaluated.outputs["evaluation"]} if evaluated else {}
            evaluated = re_evaluate(
                round=number,
                rounds=rounds,
                evaluate_settings=evaluate_settings,
                select_settings=select_settings,
                snr_settings=snr_settings,
                tracking_settings=tracking_settings,
                seed=seed,
                four_bit=four_bit,
                rows=rows,
                rank_map=rank_map,
                adapter=trained.outputs["adapter"],
                table=table,
                measurement=measurement,
                **before,
            )
            place(evaluated, f"re-evaluate ({name}, round {number})")
            rank_map = evaluated.outputs["next_rank_map"]
            carried = {"previous": evaluated.outputs["next_adapter"]}
        return Branch(evaluation=evaluated.outputs["evaluation"], adapter=trained.outputs["adapter"])

    return branch
