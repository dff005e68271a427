"""Made-up evaluations for tests of what comes after them."""

from typing import Any

from spectraqlora.artifacts import Evaluation, ModuleRank, RankMap, RoundResult, TrainingLog


def evaluation(method: str, losses: list[float], parameters: int, **changes: Any) -> Evaluation:
    """An evaluation with given row losses, one token each, on a model of two layers."""
    modules = [
        ModuleRank(
            module=f"model.layers.{layer}.mlp.up_proj",
            type="mlp.up_proj",
            layer=layer,
            tier="selected",
            rank=4,
            alpha=8.0,
        )
        for layer in (0, 1)
    ]
    ranks = RankMap(method=method, round=1, base_digest="b" * 64, settings={}, modules=modules)
    log = TrainingLog(
        method=method,
        round=1,
        settings={"max_steps": 2},
        trainable_parameters=parameters,
        train_seconds=2.0,
        train_tokens=100,
        train_tokens_per_second=50.0,
        peak_memory_bytes=2**20,
        seed=7,
        best_eval_loss=sum(losses) / len(losses),
        loss_curve=[(1, 3.0), (2, 2.0)],
        eval_curve=[(2, sum(losses) / len(losses))],
    )
    result = RoundResult(
        round=1,
        eval_loss=sum(losses) / len(losses),
        changes=["nothing moved"],
        training=log,
        rank_map=ranks,
        update_spectrum={},
    )
    values: dict[str, Any] = {
        "method": method,
        "base_digest": "b" * 64,
        "data_digest": "d" * 64,
        "base_eval_loss": 4.0,
        "base_perplexity": 54.6,
        "base_accuracy": 0.0,
        "eval_loss": sum(losses) / len(losses),
        "eval_loss_stderr": 0.1,
        "perplexity": 7.4,
        "accuracy": 0.5,
        "eval_rows": len(losses),
        "row_losses": losses,
        "row_tokens": [1] * len(losses),
        "settings": {"select": {}, "evaluate": {}, "snr": {}},
        "trainable_parameters": parameters,
        "train_seconds": 2.0,
        "train_tokens_per_second": 50.0,
        "peak_memory_bytes": 2**20,
        "rounds": [result],
        "snr_after": {m.module: 1.0 for m in modules},
    }
    return Evaluation(**(values | changes))
