"""Validates the KubeRay manifests against KubeRay's published CRDs, strictly: a field that the CRD does not know, which
the API server would drop in silence, is an error.

    python infra/validate.py FOLDER     the folder holds ray.io_rayclusters.yaml and ray.io_rayjobs.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

HERE = Path(__file__).parent / "kuberay"


def strict(schema: Any) -> Any:
    """An OpenAPI v3 structural schema as a JSON schema that allows no unknown field."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    result = {
        key: {name: strict(part) for name, part in value.items()} if key == "properties" else strict(value)
        for key, value in plain.items()
        if key not in ("format", "description", "default")
    }
    if schema.get("x-kubernetes-int-or-string"):
        result = {"type": ["integer", "string"]}
    # a plain object without properties is pruned empty
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def findings(folder: Path) -> list[str]:
    """What is wrong, a line each."""
    known = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": True,
            }
            known[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = strict(schema)
    told, checked = [], 0
    for path in sorted(HERE.glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            validator = known.get((manifest["apiVersion"], manifest["kind"]))
            if validator is None:
                continue
            checked += 1
            for error in Draft202012Validator(validator).iter_errors(manifest):
                place = ".".join(map(str, error.absolute_path))
                told.append(f"{path.name}: {place}: {error.message[:200]}")
    if not checked:
        told.append(f"{folder} has no CRD of our manifests: it should hold KubeRay's ray.io_*.yaml")
    return told


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python infra/validate.py FOLDER (of KubeRay's CRDs)")
    wrong = findings(Path(sys.argv[1]))
    print("\n".join(wrong) or "the KubeRay manifests are valid")
    sys.exit(1 if wrong else 0)
