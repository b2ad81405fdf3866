"""The recipes that come with the package: their names, and what each is for. Imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED_RECIPES = Path(__file__).parent / "recipes"
SMALL_PIXELS = 64  # side of the photographs of recipes that train on two CPU cores
GROUPS = {
    "demo": "to try it: bundled photographs, five minutes on two CPU cores",
    "small": "small models at 64 px, for two CPU cores: inpaint run NAME --set data.source=FOLDER",
    "sweeps": "sweeps, for two CPU cores: inpaint sweep NAME --set data.source=FOLDER",
    "papers": "schedules of the papers, for GPUs: inpaint run NAME --set data.source=FOLDER",
}
"""Group -> what its recipes have in common, in the order in which they are shown."""


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    group: str
    """A key of GROUPS."""
    description: str
    """The first line of its file, a comment."""


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))


def describe_recipes() -> list[ShippedRecipe]:
    """The shipped recipes by group and name."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast
    recipes = []
    for name in shipped_recipes():
        text = (SHIPPED_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        description = text.partition("\n")[0].removeprefix("#").strip()
        recipes.append(ShippedRecipe(name, _group(name, yaml.load(text, loader)), description))
    return sorted(recipes, key=lambda recipe: (list(GROUPS).index(recipe.group), recipe.name))


def _group(name: str, content: dict[str, Any]) -> str:
    if name == "demo":
        return "demo"
    if "sweep" in content:
        return "sweeps"
    return "small" if content["data"]["size"] <= SMALL_PIXELS else "papers"
