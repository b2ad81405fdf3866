"""Validates the KubeRay manifests strictly against KubeRay's published CRDs: an unknown field, which the API server would
drop silently, is an error.

    python infra/validate.py FOLDER     the folder holds ray.io_rayclusters.yaml and ray.io_rayjobs.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

KUBERAY_FOLDER = Path(__file__).parent / "kuberay"


def strict_schema(schema: Any) -> Any:
    """An OpenAPI v3 structural schema as a JSON schema that forbids unknown fields."""
    if isinstance(schema, list):
        return [strict_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    result = {
        key: {name: strict_schema(field) for name, field in value.items()}
        if key == "properties"
        else strict_schema(value)
        for key, value in plain.items()
        if key not in ("format", "description", "default")
    }
    if schema.get("x-kubernetes-int-or-string"):
        result = {"type": ["integer", "string"]}
    # the API server removes all fields of a plain object without properties
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def find_problems(folder: Path) -> list[str]:
    """Problems of our manifests, one per line."""
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": True,
            }
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = strict_schema(schema)
    problems, checked = [], 0
    for path in sorted(KUBERAY_FOLDER.glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            schema = schemas.get((manifest["apiVersion"], manifest["kind"]))
            if schema is None:
                continue
            checked += 1
            for error in Draft202012Validator(schema).iter_errors(manifest):
                field = ".".join(map(str, error.absolute_path))
                problems.append(f"{path.name}: {field}: {error.message[:200]}")
    if not checked:
        problems.append(f"{folder} has no CRD of our manifests: it should hold KubeRay's ray.io_*.yaml")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python infra/validate.py FOLDER (of KubeRay's CRDs)")
    problems = find_problems(Path(sys.argv[1]))
    print("\n".join(problems) or "the KubeRay manifests are valid")
    sys.exit(1 if problems else 0)
