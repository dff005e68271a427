"""qlora: the same rank on everything."""

from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules, parameters

MIXED = modules(8, q=(32, 32), up=(96, 32))


def test_every_matrix_gets_the_same_rank_and_no_score() -> None:
    rank_map = first_ranks("qlora", MIXED, {MIXED[0].module: (1.0, 0.0)}, SelectSettings(rank=8))
    assert {(m.tier, m.rank, m.alpha, m.lr_scale, m.score) for m in rank_map.modules} == {
        ("all", 8, 16.0, 1.0, None)
    }
    assert parameters(rank_map, MIXED) == 8 * 8 * (64 + 128)


def test_a_budget_sets_the_highest_rank_that_it_pays_for() -> None:
    settings = SelectSettings(rank=8, budget=0.7)
    # 0.7 · 8 = 5.6 directions everywhere.
    assert {m.rank for m in first_ranks("qlora", MIXED, {}, settings).modules} == {5}
