"""The shipped files for clusters: they parse, have the pinned versions, expose nothing, hold no secret, and name commands
and recipes that exist. Their fields against KubeRay's CRDs: `make validate-infra`."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.__main__ import parser
from pipelines.reading import load_recipe

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
YAMLS = sorted(path.relative_to(INFRA).as_posix() for path in INFRA.rglob("*.yaml"))


def load(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def clusters() -> list[dict[str, Any]]:
    return [load("kuberay/raycluster.yaml")["spec"], load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]]


def pods(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def test_every_image_and_version_is_the_pinned_one() -> None:
    assert VERSION
    texts = {path: path.read_text() for path in INFRA.rglob("*") if path.is_file()}
    tags = [tag for text in texts.values() for tag in re.findall(r"rayproject/ray:([\d.]+)", text)]
    assert set(tags) == {PINS["ray"]}
    assert {spec["rayVersion"] for spec in clusters()} == {PINS["ray"]}
    ours = {tag for text in texts.values() for tag in re.findall(r"inpaint:([\d.]+)-", text)}
    assert ours == {VERSION[1]}
    assert "-c constraints.txt" in texts[INFRA / "Dockerfile"]
    images = re.findall(r"^\s*(?:- )?image: (\S+)", "\n".join(texts.values()), re.M)
    assert images
    assert all(image.startswith(f"inpaint:{VERSION[1]}-") for image in images)


@pytest.mark.parametrize("spec", clusters(), ids=["raycluster", "rayjob"])
def test_kuberay_clusters_are_closed_and_grow(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    policy = load("kuberay/networkpolicy.yaml")["spec"]
    chosen = policy["podSelector"]["matchLabels"].items()
    groups = dict(pods(spec))
    assert {"head", "cpus", "gpus", "spot-gpus"} == groups.keys()
    for name, pod in groups.items():
        assert pod["metadata"]["labels"].items() >= chosen, name
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "inpaint-credentials"}}]
        assert all(
            "KEY" not in variable["name"] and "PASSWORD" not in variable["name"]
            for variable in container["env"]
        )
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        limits = container["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == ("gpus" in name)
        assert container["image"].endswith("-gpu" if "gpus" in name else "-cpu")
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
    spot = groups["spot-gpus"]["spec"]
    assert any(toleration["key"] == "spot" for toleration in spot["tolerations"])
    assert spot["terminationGracePeriodSeconds"] <= 120


def test_the_network_policy_lets_nobody_in_but_the_cluster() -> None:
    policy = load("kuberay/networkpolicy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    own, others = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    assert {port["port"] for port in others["ports"]} == {8265}
    assert all("podSelector" in source for source in others["from"])  # never a whole namespace or the world


def test_compose_publishes_on_loopback_alone_and_starts_with_no_secret_missing() -> None:
    compose, text = load("compose.yaml"), (INFRA / "compose.yaml").read_text()
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "ALL" in service["cap_drop"]
    secrets = ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
    example = (INFRA / ".env.example").read_text()
    for name in secrets:
        assert re.search(rf"{name}: \$\{{{name}:\?", text), name  # compose refuses to start without it
        assert re.search(rf"^{name}=$", example, re.M), name
    filled = (ROOT / "tests/infra/filled.env").read_text()
    assert set(re.findall(r"\$\{(\w+)[:}]", text)) <= set(re.findall(r"^(\w+)=", filled, re.M))


def test_aws_is_closed_but_for_ssh_and_has_no_keys() -> None:
    aws = load("aws.yaml")
    rules = aws["provider"]["security_group"]["IpPermissions"]
    assert [rule["FromPort"] for rule in rules] == [22]
    assert all(block["CidrIp"] != "0.0.0.0/0" for rule in rules for block in rule["IpRanges"])
    assert "RAY_AUTH_MODE=token" in " ".join(aws["docker"]["run_options"])
    assert any(target.endswith("/.ray/auth_token") for target in aws["file_mounts"])
    (start,) = [command for command in aws["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    nodes = aws["available_node_types"].values()
    assert all(node["node_config"]["IamInstanceProfile"] for node in nodes)
    assert aws["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {
        "MarketType": "spot"
    }
    assert all(node["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for node in nodes)


def test_no_file_holds_a_secret() -> None:
    told = re.compile(r"(?i)(password|secret|token|key_id)[\w-]*\s*[:=]\s*[\"']?([A-Za-z0-9+/]{16,})")
    for path in [*INFRA.rglob("*"), ROOT / "tests/infra/filled.env"]:
        if path.is_file() and path.suffix != ".md":
            assert not told.search(path.read_text()), path


def commands() -> list[str]:
    """Every `inpaint ...` that a file of infra runs."""
    found = []
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix in (".md", ".yaml"):
            text = re.sub(r"\s+#.*", "", path.read_text()) if path.suffix == ".md" else path.read_text()
            text = re.sub(r"(?m)^#\s*", "", text)
            found += re.findall(r"(?m)(?:^|[ `])(inpaint (?:run|services|plan|submit)[^`&\n]*)", text)
    compose = load("compose.yaml")["services"]
    found += [service["command"] for service in compose.values() if service["command"].startswith("inpaint")]
    found.append(load("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    return sorted({command.strip() for command in found if "RECIPE" not in command})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_infra_parses_and_its_recipe_loads(command: str) -> None:
    words = shlex.split(command)[1:]
    if words in (["run"], ["services"]):
        return  # named in a sentence
    args = parser().parse_args(words)
    if hasattr(args, "recipe"):
        load_recipe(args.recipe, args.set)


def validator() -> Any:
    spec = importlib.util.spec_from_file_location("validate", INFRA / "validate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_validator_finds_unknown_fields_and_wrong_types(tmp_path: Path) -> None:
    """On a CRD of a few fields, of which our manifests have more."""
    schema = {
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {
                "type": "object",
                "properties": {
                    "rayVersion": {"type": "integer"},
                    "authOptions": {"type": "object", "properties": {}},
                },
            },
        },
    }
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    crd = {"spec": {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": versions}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    found = validator().findings(tmp_path)
    assert any("spec.rayVersion" in line and "not of type 'integer'" in line for line in found)
    assert any("headGroupSpec" in line and "unexpected" in line for line in found)
    assert any("spec.authOptions" in line for line in found)
    assert "has no CRD" in validator().findings(tmp_path / "none")[0]
