"""The shipped files for clusters: they parse, have the pinned versions, expose nothing, hold no secret, and name commands
and recipes that exist. Their fields against KubeRay's CRDs: `make validate-infra`."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.__main__ import parser
from pipelines.cluster.submitting import portable
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
    operator, submitter = [source["podSelector"]["matchLabels"] for source in others["from"]]
    # the only label that pods of the operator's Helm chart and of its kustomize manifests share
    assert operator == {"app.kubernetes.io/component": "kuberay-operator"}
    # Kubernetes labels a Job's pods with the Job's name, which KubeRay makes the RayJob's
    assert submitter == {"job-name": load("kuberay/rayjob.yaml")["metadata"]["name"]}


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


def test_compose_gives_the_gpus_to_one_worker() -> None:
    """Two replicas would each take all of them for their own."""
    deploy = load("compose.gpu.yaml")["services"]["worker"]["deploy"]
    (device,) = deploy["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert deploy["replicas"] == 1


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Ray's own way from a cluster file to EC2 requests keeps a key pair in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="inpaint-s3")
        yield boto3.client("ec2", region_name=load("aws.yaml")["provider"]["region"])


def bootstrap(aws: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(aws)
    validate_config(prepared)
    found: dict[str, Any] = bootstrap_aws(prepared)
    return found


def test_aws_is_closed_but_for_ssh_and_has_no_keys(ec2: Any) -> None:
    """As Ray would start it: in the group that was made beforehand, as it was made, and in no other."""
    aws = load("aws.yaml")
    group = ec2.create_security_group(GroupName="inpaint-ray", Description="inpaint")["GroupId"]
    ssh = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])
    before = ec2.describe_security_groups()["SecurityGroups"]
    for node in aws["available_node_types"].values():
        assert set(node["node_config"]["SecurityGroupIds"]) == {"sg-" + "0" * 17}
        node["node_config"]["SecurityGroupIds"] = [group]
    ready = bootstrap(aws)
    assert ec2.describe_security_groups()["SecurityGroups"] == before
    nodes = {name: node["node_config"] for name, node in ready["available_node_types"].items()}
    assert nodes["gpu"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for node in nodes.values():
        assert node["SecurityGroupIds"] == [group]
        assert node["IamInstanceProfile"] == {"Name": "inpaint-s3"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert "RAY_AUTH_MODE=token" in " ".join(ready["docker"]["run_options"])
    assert any(target.endswith("/.ray/auth_token") for target in ready["file_mounts"])
    (start,) = [command for command in ready["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    commands = [
        command for key, value in ready.items() if key.endswith("setup_commands") for command in value
    ]
    assert not any("pip install" in command for command in commands)  # Ray's defaults bring a nightly build


def test_aws_stops_while_no_group_was_made(ec2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        bootstrap(load("aws.yaml"))
    assert "Failed to detect a security group" in capsys.readouterr().err


def test_no_file_holds_a_secret() -> None:
    told = re.compile(r"(?i)(password|secret|token|key_id)[\w-]*\s*[:=]\s*[\"']?([A-Za-z0-9+/]{16,})")
    for path in [*INFRA.rglob("*"), ROOT / "tests/infra/filled.env"]:
        if path.is_file() and path.suffix != ".md":
            assert not told.search(path.read_text()), path


def commands() -> list[str]:
    """Every `inpaint ...` that a file of infra runs."""
    found = []
    for path in INFRA.rglob("*"):
        text = path.read_text() if path.suffix in (".md", ".yaml") else ""
        if path.suffix == ".yaml":  # what the comments say; what is run is taken from the fields below
            text = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        text = re.sub(r"\s+#.*", "", text).replace("\\\n", " ")
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
    if getattr(args, "recipe", None):
        recipe = load_recipe(args.recipe, args.set)
        if args.command == "submit" or (args.storage or "").startswith(
            "s3://"
        ):  # on other machines than this
            elsewhere = recipe.model_copy(update={"storage": args.storage})
            portable(elsewhere, "http://head:8265")
            features = [section.options.get("features") for section in recipe.models.values()]
            weights = [stack.get("weights") for stack in features if isinstance(stack, dict)]
            assert all(path is None or path.startswith("s3://") for path in weights), weights


def test_what_runs_in_the_compose_cluster_joins_it() -> None:
    """`inpaint run` starts a Ray of its own where RAY_ADDRESS names none."""
    text = (INFRA / "README.md").read_text()
    run = [line for line in text.splitlines() if "exec" in line and "inpaint run" in line]
    assert run
    assert all("-e RAY_ADDRESS=auto" in line for line in run)


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
                    "authOptions": {"type": "object"},  # which the API server prunes empty
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
