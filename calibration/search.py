"""The fastest recipe within an accuracy budget, from the cost and loss of each layer in each scheme.

Every price of noise (milliseconds that a unit of it is worth) picks one scheme for each group of layers: that
with the least time + price x noise. As the price falls from infinity to zero these picks go from no
quantisation to the fastest model, through one line of recipes, each the fastest of all with its summed noise
(the lower convex hull). The line is bisected by the measured losses of the recipes, so few of them are
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from ..quantization.recipe import Recipe, Rule


@dataclass(frozen=True)
class Option:
    """A scheme that a group of layers may have: its milliseconds, and its noise over signal (as power)."""

    scheme: str
    ms: float
    noise: float


@dataclass(frozen=True)
class Group:
    """Layers that must share a scheme, because a builder joins their products, and their options."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Tried:
    """A recipe that was measured: its place on the line (0 is the fastest), modelled time and loss."""

    place: int
    ms: float
    lost: float
    within: bool


@dataclass(frozen=True)
class Choice:
    """Why a group has its scheme."""

    layers: tuple[str, ...]
    scheme: str
    reason: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class SearchResult:
    """The recipe of a search, how it was found, and each group's reason."""

    schemes: dict[str, str]
    place: int
    places: int
    ms: float
    base_ms: float
    fastest_ms: float
    tried: tuple[Tried, ...]
    choices: tuple[Choice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


Picks = tuple[Option, ...]
"""One option for each group."""


def line(groups: Sequence[Group]) -> list[Picks]:
    """The recipes on the line, from the fastest to the one with the least noise."""
    prices = {0.0}
    for group in groups:
        pairs = ((a, b) for a in group.options for b in group.options if a.noise > b.noise)
        prices.update((b.ms - a.ms) / (a.noise - b.noise) for a, b in pairs if b.ms > a.ms)
    ordered = sorted(prices)
    between = [(a + b) / 2 for a, b in pairwise(ordered)]
    recipes: list[Picks] = []
    for price in (*between, 2 * ordered[-1] + 1):
        picks = tuple(min(group.options, key=partial(_worth, price)) for group in groups)
        if not recipes or recipes[-1] != picks:
            recipes.append(picks)
    return recipes


def _worth(price: float, option: Option) -> tuple[float, float, str]:
    return option.ms + price * option.noise, option.noise, option.scheme


def search(
    groups: Sequence[Group], base: str, budget: float, lost: Callable[[dict[str, str]], float]
) -> SearchResult:
    """The fastest recipe of the line that loses at most ``budget``.

    Args:
        groups: each has ``base`` among its options.
        base: the scheme of layers that are not quantised.
        budget: the most that may be lost, in the unit of ``lost``.
        lost: measures a recipe: layer -> scheme, of the layers that are quantised. Taken to fall along the
            line, whose last recipe quantises nothing.
    """
    recipes = line(groups)
    tried: dict[int, Tried] = {}

    def within(place: int) -> bool:
        if place not in tried:
            schemes = _schemes(groups, recipes[place], base)
            loss = lost(schemes) if schemes else 0.0
            tried[place] = Tried(place, _ms(recipes[place]), loss, loss <= budget)
        return tried[place].within

    low, high = 0, len(recipes) - 1
    while low < high:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle + 1
    within(high)
    picks = recipes[high]
    return SearchResult(
        _schemes(groups, picks, base),
        high,
        len(recipes),
        _ms(picks),
        sum(next(o.ms for o in g.options if o.scheme == base) for g in groups),
        _ms(recipes[0]),
        tuple(tried[place] for place in sorted(tried)),
        tuple(_reason(g, pick, base) for g, pick in zip(groups, picks, strict=True)),
    )


def as_recipe(
    name: str, schemes_of: Mapping[str, str], layers: Sequence[str], base: str, summary: str
) -> Recipe:
    """``schemes_of`` (layer -> scheme) as an ordinary recipe: a rule for each kind of layer, then its
    exceptions.

    Args:
        name: of the recipe.
        schemes_of: the quantised layers.
        layers: all linear layers of the model.
        base: the base type.
        summary: of the recipe.
    """
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    rules, exceptions = [], []
    for kind, members in kinds.items():
        schemes = [schemes_of.get(layer, base) for layer in members]
        common = max(sorted(set(schemes)), key=schemes.count)
        if common != base:
            rules.append(Rule(kind, common))
        exceptions += [Rule(m, s) for m, s in zip(members, schemes, strict=True) if s != common]
    return Recipe(name, (*rules, *exceptions), "base", base, summary)


def _kind(layer: str) -> str:
    """``layer`` with its block's number left open."""
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))


def _schemes(groups: Sequence[Group], picks: Picks, base: str) -> dict[str, str]:
    pairs = zip(groups, picks, strict=True)
    return {layer: pick.scheme for g, pick in pairs if pick.scheme != base for layer in g.layers}


def _ms(picks: Picks) -> float:
    return math.fsum(pick.ms for pick in picks)


def _reason(group: Group, pick: Option, base: str) -> Choice:
    own = next(option for option in group.options if option.scheme == base)
    quickest = min(group.options, key=lambda option: option.ms)
    words = []
    if pick.scheme != base:
        words.append(f"saves {own.ms - pick.ms:.3g} ms of {own.ms:.3g}, at {_db(pick)}")
    if quickest.ms < pick.ms:
        more = "more, " if words else "ms, but "
        words.append(f"{quickest.scheme} would save {pick.ms - quickest.ms:.3g} {more}at {_db(quickest)}")
    return Choice(group.layers, pick.scheme, "; ".join(words) or "no scheme is faster", group.options)


def _db(option: Option) -> str:
    return f"{-10 * math.log10(option.noise):.1f} dB" if option.noise > 0 else "no loss"
