"""All methods by name. Whatever differs between methods is asked here: no other package names one.

A new method is a file next to this one, an entry in `METHODS`, and its two parameters in the compare step's interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.alors import ALoRS
from spectraqlora.methods.hybrid import Hybrid
from spectraqlora.methods.qlora import QLoRA
from spectraqlora.methods.qlora_half import QLoRAHalf
from spectraqlora.methods.random_control import RandomControl
from spectraqlora.methods.sgm import SGM
from spectraqlora.settings import SelectSettings, Settings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    from spectraqlora.methods.carry_over import UpdateSpectrum
    from spectraqlora.signals.gradients import GradientSketch


class Method(Protocol):
    """Which modules get an adapter, and of which rank."""

    name: str
    """As users write it: lower-case letters, digits and underscores."""
    summary: str
    """What it does, in half a sentence."""
    control: bool
    """Whether it is a control: shown in the comparison, never its winner."""
    moves: bool
    """Whether its rank map changes between rounds; where not, one round trains the steps of all. See `MovingMethod`."""
    recomputes: bool
    """Whether training recomputes activations where `train.gradient_checkpointing` is auto, on CPUs too."""
    colour: str
    """Of its lines and bars in the report, as #rrggbb."""

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Whether its first ranks, or the first A of its adapters, are made from gradient sketches."""
        ...

    def check(self, modules: list[LinearModule], select: SelectSettings) -> None:
        """Refuse settings that do not fit the model, before anything long starts.

        Raises:
            InputError: such as a rank above the smallest side of a matrix.
        """
        ...

    def first_ranks(
        self,
        modules: list[LinearModule],
        scores: Scores,
        select: SelectSettings,
        seed: int,
        sketches: Mapping[str, GradientSketch],
    ) -> RankMap:
        """The first round's rank map, its base_digest still empty.

        Args:
            modules: all of the model, in its order.
            scores: by `select.signal`; modules without one are never selected.
            select: the settings.
            seed: of what is drawn.
            sketches: of the base model's gradients; empty unless `measures_gradients`.

        Raises:
            InputError: nothing would be trained.
        """
        ...


class MovingMethod(Method, Protocol):
    """A method whose rank map changes between rounds."""

    def next_ranks(
        self,
        current: RankMap,
        modules: list[LinearModule],
        scores: Scores,
        updates: Mapping[str, UpdateSpectrum],
        select: SelectSettings,
    ) -> RankMap:
        """The next round's rank map, with what moved in words (`RankMap.changes`).

        Args:
            current: this round's map.
            modules: all of the model, in its order.
            scores: by `select.signal`, measured with this round's adapters.
            updates: spectrum of (alpha/r)·B·A of the modules with an adapter.
            select: the settings.
        """
        ...


_ALL: tuple[Method, ...] = (QLoRA(), Hybrid(), ALoRS(), SGM(), QLoRAHalf(), RandomControl())
METHODS: dict[str, Method] = {entry.name: entry for entry in _ALL}
"""In the order in which tables show them."""


def names() -> tuple[str, ...]:
    """All methods' names, in the order in which tables show them."""
    return tuple(METHODS)


def method(name: str, key: str = "method") -> Method:
    """A method by its name.

    Args:
        name: as users write it.
        key: the setting that named it, for the error.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise InputError(key, name, f"{', '.join(others)} or {last}")
    return METHODS[name]


def moving(name: str) -> MovingMethod:
    """A method whose rank map moves between rounds.

    Raises:
        InputError: there is no such method, or it never moves.
    """
    chosen = method(name)
    if not chosen.moves:
        wanted = " or ".join(repr(entry.name) for entry in METHODS.values() if entry.moves)
        raise InputError("method", name, f"{wanted}, whose rank map moves between rounds")
    return cast(MovingMethod, chosen)


def check_methods(settings: Settings) -> Settings:
    """The settings as they are.

    Raises:
        InputError: they name a method that there is not.
    """
    for index, name in enumerate(settings.methods):
        method(name, f"methods.{index}")
    method(settings.retrain.method, "retrain.method")
    return settings
