"""random: hybrid's number of modules, drawn by chance."""

from spectraqlora.methods.catalogue import method
from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules

MODULES = modules(8, q=(32, 32), k=(32, 32))
HALF = SelectSettings(percent=50)


def test_as_many_of_every_type_as_hybrid_whatever_the_scores() -> None:
    scores = {m.module: (float(m.layer), 0.0) for m in MODULES}
    drawn = first_ranks("random", MODULES, scores, HALF)
    assert [sum(m.type == kind for m in drawn.active()) for kind in ("q", "k")] == [4, 4]
    assert drawn == first_ranks("random", MODULES, {}, HALF)
    assert all(m.score is None for m in drawn.modules)


def test_another_seed_draws_other_modules_and_the_same_seed_the_same() -> None:
    maps = [method("random").first_ranks(MODULES, {}, HALF, seed, {}) for seed in (1, 1, 2)]
    assert maps[0] == maps[1] != maps[2]
