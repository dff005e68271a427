"""Made-up modules and rank maps of the methods."""

from collections.abc import Mapping

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.catalogue import method
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.gradients import GradientSketch
from spectraqlora.signals.scores import Scores


def modules(layers: int, **sizes: tuple[int, int]) -> list[LinearModule]:
    """Modules `m.<layer>.<type>` of every type, each with its out and in features."""
    return [
        LinearModule(module=f"m.{i}.{t}", type=t, layer=i, out_features=out, in_features=into, four_bit=True)
        for t, (out, into) in sizes.items()
        for i in range(layers)
    ]


def first_ranks(
    name: str,
    members: list[LinearModule],
    scores: Scores,
    select: SelectSettings,
    sketches: Mapping[str, GradientSketch] | None = None,
) -> RankMap:
    """A method's first rank map with seed 1."""
    return method(name).first_ranks(members, scores, select, 1, sketches or {})


def parameters(rank_map: RankMap, members: list[LinearModule]) -> int:
    """Trainable parameters of a map; what a group shares counts once."""
    infos = {m.module: m for m in members}
    sizes: dict[tuple[str, str | int], int] = {}
    for entry in rank_map.active():
        for factor, side in (("A", infos[entry.module].in_features), ("B", infos[entry.module].out_features)):
            own = entry.group is None or entry.shared not in ("pair", factor)
            sizes[factor, entry.module if own or entry.group is None else entry.group] = entry.rank * side
    return sum(sizes.values())
