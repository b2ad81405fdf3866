"""What made a version, as label and text, and what differs between two versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from pipelines.studio.registry_snapshot import VersionSummary

MAX_VALUE_CHARS = 300
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Fact:
    """One line of a version's origin."""

    label: str
    text: str
    copy: str = ""
    """The whole value, if the text shortens it."""
    href: str = ""


def origin_facts(version: VersionSummary, metadata: Mapping[str, Any]) -> list[Fact]:
    """Photographs, shards, edges, training, sweep, parent, code, packages and machine, as far as they are on record."""
    facts: list[Fact] = []

    def add(label: str, text: Any, copy: Any = "", href: str = "") -> None:
        if text:
            facts.append(Fact(label, str(text), str(copy or ""), href))

    splits = metadata.get("splits") or {}
    counts = ", ".join(f"{splits[split]} {split}" for split in ("train", "val", "test") if split in splits)
    source = metadata.get("source")
    add(
        "Photographs",
        f"{source or 'source not recorded'}{f' ({counts})' if counts else ''}" if source or counts else "",
    )
    shards = metadata.get("shards") or version.tags.get("inpaint.shards")
    add("Shards", short(shards), shards)
    edges = metadata.get("edges") or {}
    for sigma, digest in edges.items():
        add(f"Edges, sigma {sigma}", short(digest), digest)
    if not edges and (metadata.get("takes_edges") or metadata.get("needs_edges")):
        add("Edges", f"Canny, sigma {_number(metadata.get('sigma'))}, computed while training")
    add("Training", _training(metadata))
    if imported := metadata.get("imported"):
        add("Parent", f"imported weights: {imported}")
    sweep = metadata.get("sweep") or {}
    if sweep.get("name"):
        add(
            "Sweep",
            f"{sweep['name']}: {sweep.get('values') or 'its values'}",
            href=f"/runs/{quote(str(sweep['name']), safe='')}",
        )
    add("Machine", _machine(metadata))
    code = metadata.get("code") or {}
    changes = ", with uncommitted changes" if code.get("dirty") == "true" else ""
    commit = code.get("commit") or version.commit
    add("Code", f"commit {short(commit)}{changes}" if commit else "", commit)
    packages = metadata.get("packages") or {}
    add("Packages", ", ".join(f"{name} {number}" for name, number in packages.items()))
    scored_on = metadata.get("scored_on") or {}
    protocol = metadata.get("protocol") or {}
    if protocol:
        split = f"{scored_on['split']} " if scored_on.get("split") else ""
        add(
            "Scored on",
            f"{protocol.get('photographs', '?')} {split}photographs of {', '.join(protocol.get('sizes') or ())} px, "
            f"{', '.join(protocol.get('masks') or ())} masks, seed {protocol.get('seed', '?')}",
        )
        add(
            "Photographs' digest",
            short(protocol.get("photographs_sha256")),
            protocol.get("photographs_sha256"),
        )
        add("Masks' digest", short(protocol.get("masks_sha256")), protocol.get("masks_sha256"))
    return facts


def _training(metadata: Mapping[str, Any]) -> str:
    if "steps" not in metadata:
        return ""
    parts = [f"{metadata['steps']} steps at {metadata.get('size', '?')} px, seed {metadata.get('seed')}"]
    if masks := metadata.get("masks"):
        low, high = (f"{100 * fraction:.0f}" for fraction in metadata.get("hole_range") or (0, 0))
        holes = f"{low}" if low == high else f"{low} to {high}"
        parts.append(f"{', '.join(masks)} masks, holes of {holes} %")
    if metadata.get("precision"):
        parts.append(f"{metadata['precision']}{', channels_last' if metadata.get('channels_last') else ''}")
    return "; ".join(parts)


def _machine(metadata: Mapping[str, Any]) -> str:
    ray = metadata.get("ray") or {}
    parts = [f"{metadata['hardware']}" if metadata.get("hardware") else ""]
    for key, unit in (("nodes", "node"), ("cpus", "CPU"), ("gpus", "GPU")):
        if ray.get(key):
            parts.append(f"{_number(ray[key])} {unit}{'' if ray[key] == 1 else 's'}")
    return ", ".join(part for part in parts if part)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def short(digest: Any) -> str:
    return str(digest or "")[:12]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value of a, value of b) for what two versions' metadata say differently: data, training, recipe, code."""
    left, right = _comparable_fields(a), _comparable_fields(b)
    names = sorted({*left, *right}, key=lambda name: (name.startswith("recipe."), name))
    return [
        (name, left.get(name, NOT_RECORDED), right.get(name, NOT_RECORDED))
        for name in names
        if left.get(name) != right.get(name)
    ]


def _comparable_fields(metadata: Mapping[str, Any]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for key in (
        "model",
        "size",
        "sigma",
        "edge_source",
        "steps",
        "seed",
        "precision",
        "hardware",
        "source",
        "imported",
    ):
        if metadata.get(key) is not None:
            fields[key] = _text(metadata[key])
    fields |= {f"{key} digest": short(metadata[key]) for key in ("shards",) if metadata.get(key)}
    fields |= {
        f"edges sigma {sigma} digest": short(text) for sigma, text in (metadata.get("edges") or {}).items()
    }
    for key in ("masks", "splits", "options"):
        _flatten(key, metadata.get(key) or {}, fields)
    if commit := (metadata.get("code") or {}).get("commit"):
        fields["code commit"] = short(commit)
    _flatten("package", metadata.get("packages") or {}, fields)
    try:
        recipe = yaml.safe_load(str(metadata.get("recipe") or "")) or {}
    except yaml.YAMLError:
        recipe = {}
    if isinstance(recipe, dict):
        _flatten("recipe", _own_recipe(recipe, str(metadata.get("model", ""))), fields)
    return fields


def _own_recipe(recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """The recipe with the section of this version's model only, if one section is of it."""
    models = recipe.get("models")
    if not isinstance(models, dict):
        return recipe
    own = [
        part
        for key, part in models.items()
        if (part.get("name", key) if isinstance(part, dict) else key) == model
    ]
    return {**recipe, "models": {model: own[0]}} if len(own) == 1 else recipe


def _flatten(prefix: str, value: Any, fields: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(f"{prefix}.{key}", part, fields)
    else:
        fields[prefix] = _text(value)


def _text(value: Any) -> str:
    text = _number(value) if not isinstance(value, list) else ", ".join(map(_number, value))
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"
