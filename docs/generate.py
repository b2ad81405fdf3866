"""Writes what the pages take from the code: the tables of recipes.md and the diagrams. A test compares.

python docs/generate.py           write
python docs/generate.py --check   exit status 1 and the names of the files that differ
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from data_prep.mask_shapes import MASK_GENERATORS
from data_prep.masks import FolderMasks
from models import list_models, model_class, options_class
from pipelines.evaluation.metrics import METRIC_DEFINITIONS, OPTIONAL_DEFINITIONS, SET_DEFINITIONS
from pipelines.recipe import schema, sections, sweep

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SECTIONS = {
    "recipe": schema.Recipe,
    "data": sections.Data,
    "edges": sections.Edges,
    "train": sections.Train,
    "scaling": sections.Scaling,
    "models": sections.ModelConfig,
    "evaluate": sections.EvaluationConfig,
    "evaluate.distance": sections.DistanceConfig,
    "evaluate.features": sections.FeatureWeights,
    "evaluate.features.NETWORK": sections.WeightsFile,
    "sweep": sweep.Sweep,
    "sweep.fields": sweep.Domain,
    "sweep.budget": sweep.Budget,
}
"""Place in a recipe -> its class. A field that holds a section is listed in its own table."""


def main() -> int:
    written = {
        "recipes.md": recipes(),
        "evaluation.md": evaluation(),
        "diagrams/pipeline.svg": pipeline(),
        "diagrams/layers.svg": layers(),
    }
    stale = [name for name, text in written.items() if _read(DOCS / name) != text]
    if "--check" in sys.argv:
        print("\n".join(f"docs/{name} is stale: python docs/generate.py" for name in stale))
        return int(bool(stale))
    for name in stale:
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(written[name], encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def recipes() -> str:
    """recipes.md with the text between its markers renewed."""
    tables = {f"fields of {name}": field_table(section) for name, section in SECTIONS.items()}
    tables |= {f"options of {name}": option_table(name) for name in list_models()}
    tables |= {"kinds of masks": mask_table(), "options of mask folders": folder_table()}

    def renew(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{tables.pop(match[1])}\n<!-- end -->"

    marked = r"<!-- ((?:fields|options|kinds) of [^>]+?) -->.*?<!-- end -->"
    text = re.sub(marked, renew, _read(DOCS / "recipes.md"), flags=re.DOTALL)
    if tables:
        raise SystemExit(f"docs/recipes.md has no place for: {', '.join(tables)}")
    return text


def evaluation() -> str:
    """evaluation.md with the table of metrics renewed."""
    text = _read(DOCS / "evaluation.md")
    for name, definitions in (
        ("metrics", METRIC_DEFINITIONS),
        ("optional metrics", OPTIONAL_DEFINITIONS),
        ("metrics of sets", SET_DEFINITIONS),
    ):
        rows = [(f"`{metric}`", definition) for metric, definition in definitions.items()]
        new = f"<!-- {name} -->\n\n{table(('metric', 'definition'), rows)}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, new=new: new, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def field_table(section: type[BaseModel]) -> str:
    rows = []
    for name, field in section.model_fields.items():
        default = field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
        shown = "required" if default is PydanticUndefined else value(default)
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation  # type: ignore[misc]
        if not field.description:
            raise SystemExit(f"{section.__name__}.{name} has no description")
        rows.append((f"`{name}`", annotation(kind), shown, field.description))
    return table(("field", "type", "default", "meaning"), rows)


def option_table(model: str) -> str:
    """The options of a model, with the texts that stand under them in its source."""
    options = options_class(model)
    texts = attribute_docstrings(options)
    rows = []
    for field in fields(options):
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        if field.name not in texts:
            raise SystemExit(f"{options.__name__}.{field.name} has no docstring")
        rows.append((f"`{field.name}`", value(default), texts[field.name]))
    module = inspect.getdoc(sys.modules[model_class(model).__module__]) or ""
    first = module.split("\n\n")[0].replace("\n", " ")
    return f"{first}\n\n{table(('option', 'default', 'meaning'), rows)}"


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Field -> the string under it in the class body."""
    (body,) = [
        node for node in ast.walk(ast.parse(inspect.getsource(cls))) if isinstance(node, ast.ClassDef)
    ][:1]
    docstrings = {}
    for field, text in zip(body.body, body.body[1:]):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docstrings[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return docstrings


def mask_table() -> str:
    rows = []
    for kind, function in MASK_GENERATORS.items():
        parameters = list(inspect.signature(function).parameters.values())[3:]
        options = ", ".join(f"`{p.name}` {value(p.default)}" for p in parameters) or "none"
        rows.append(
            (f"`{kind}`", (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "), options)
        )
    return table(("kind", "masks", "options and defaults"), rows)


def folder_table() -> str:
    texts = attribute_docstrings(FolderMasks)
    options = [field for field in fields(FolderMasks) if field.name in texts and field.default is not MISSING]
    rows = [(f"`{field.name}`", value(field.default), texts[field.name]) for field in options]
    return table(("option", "default", "meaning"), rows)


def annotation(kind: Any) -> str:
    """A type in the words of a recipe's author."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for item in inner[1:] for limit in (getattr(item, "metadata", None) or [item])]
        signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
        bounds = [(signs[type(x)][0], getattr(x, signs[type(x)][1])) for x in limits if type(x) in signs]
        words = [f"{sign} {bound:g}" for sign, bound in bounds if bound < 1e15]
        return " ".join([annotation(inner[0]), ", ".join(words)]).strip()
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin in (Union, UnionType):
        return " or ".join("none" if part is type(None) else annotation(part) for part in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {annotation(inner[0])}"
        return f"[{', '.join(annotation(part) for part in inner)}]"
    if origin is list:
        return f"list of {annotation(inner[0])}"
    if kind == get_args(sections.Masks)[0]:
        return "a kind, or kinds and folders → weight or options"
    if origin is dict:
        return f"{annotation(inner[0])} → {annotation(inner[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def value(default: Any) -> str:
    """A default as YAML has it."""
    if default is None:
        return "none"
    if isinstance(default, BaseModel):
        return "see its table"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple | list):
        return f"[{', '.join(value(item) for item in default)}]"
    if isinstance(default, dict):
        return "{" + ", ".join(f"{key}: {value(item)}" for key, item in default.items()) + "}"
    return f"{default:g}" if isinstance(default, float) else str(default)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(':--' for _ in head)}|", *lines[1:]]) + "\n"


# Diagrams: boxes and arrows, in grey that both a light and a dark page can show.


def svg(width: int, height: int, shapes: list[str], title: str) -> str:
    style = (
        "text{font:14px sans-serif;fill:#777}.t{font-weight:bold}rect{fill:#777;fill-opacity:.12;stroke:#777;rx:6}"
        "path{stroke:#777;fill:none;marker-end:url(#a)}"
    )
    head = (
        '<marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#777;stroke:none;marker-end:none"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<style>{style}</style><defs>{head}</defs>" + "".join(shapes) + "</svg>\n"
    )


def box(x: int, y: int, width: int, title: str, text: str) -> str:
    middle = x + width // 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="52"/>'
        f'<text class="t" x="{middle}" y="{y + 22}" text-anchor="middle">{escape(title)}</text>'
        f'<text x="{middle}" y="{y + 41}" text-anchor="middle" style="font-size:12px">{escape(text)}</text>'
    )


def arrow(*points: tuple[int, int]) -> str:
    return f'<path d="M{"L".join(f"{x} {y}" for x, y in points)}"/>'


def pipeline() -> str:
    """The steps of a run, with an arrow from each step to those that take its outputs."""
    steps = [
        ("shard", "photographs → tars"),
        ("edges", "tars → edge tars"),
        ("train", "→ weights"),
        ("evaluate", "→ scores"),
        ("register", "→ versions"),
    ]
    per = ["one", "one per sigma", "one per model", "one", "one per model"]
    shapes, width, gap = [], 140, 40
    left = [10 + number * (width + gap) for number in range(len(steps))]
    middle = [x + width // 2 for x in left]
    for x, center, (title, text), number in zip(left, middle, steps, per, strict=True):
        shapes.append(box(x, 60, width, title, text))
        shapes.append(
            f'<text x="{center}" y="170" text-anchor="middle" style="font-size:12px">{escape(number)}</text>'
        )
    shapes += [arrow((x - gap, 86), (x, 86)) for x in left[1:]]
    # the tars go to all other steps, the weights to the registration too
    shapes.append(arrow((middle[0], 60), (middle[0], 25), (middle[4], 25), (middle[4], 60)))
    shapes += [arrow((middle[number], 25), (middle[number], 60)) for number in (2, 3)]
    shapes.append(arrow((middle[2], 112), (middle[2], 140), (middle[4], 140), (middle[4], 112)))
    return svg(left[-1] + width + 10, 180, shapes, "shard, edges, train, evaluate, register")


def layers() -> str:
    """The packages and modules by layer, from the test that checks their imports."""
    shapes = []
    for number, names in enumerate(reversed(layer_names())):
        short = [name.removeprefix("pipelines.") for name in names]
        short = ["__init__" if name == "pipelines" else name for name in short]
        packages = [name for name in short if (ROOT / name).is_dir() or (ROOT / "pipelines" / name).is_dir()]
        modules = [f"{name}.py" for name in short if name not in packages]
        text = (" · ".join(packages), " · ".join(modules)) if packages else (" · ".join(modules), "")
        shapes.append(box(10, 10 + 60 * number, 620, *text))
    return svg(640, 12 + 60 * len(layer_names()), shapes, "the packages, each above those that it imports")


def layer_names() -> tuple[tuple[str, ...], ...]:
    """LAYERS of tests/test_layout.py, lowest first."""
    tree = ast.parse(_read(ROOT / "tests" / "test_layout.py"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    layers: tuple[tuple[str, ...], ...] = ast.literal_eval(value)
    return layers


if __name__ == "__main__":
    sys.exit(main())
