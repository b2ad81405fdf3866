"""The files of infra/: they parse, have the pinned versions, expose no ports, hold no secrets, and their commands and
recipes exist. `make validate-infra` checks their fields against KubeRay's CRDs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config, with_head_node_ip

from pipelines.cli.main import build_parser
from pipelines.cluster.jobs import make_portable
from pipelines.recipe.load import load_recipe, recipe_from_args, shipped_recipes

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)


def files() -> list[Path]:
    """The files of infra/ without __pycache__."""
    return [path for path in INFRA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


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
    texts = {path: path.read_text() for path in files()}
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
def test_kuberay_clusters_need_a_token_and_autoscale(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    policy = load("kuberay/networkpolicy.yaml")["spec"]
    policy_labels = policy["podSelector"]["matchLabels"].items()
    groups = dict(pods(spec))
    assert {"head", "cpus", "gpus", "spot-gpus"} == groups.keys()
    for name, pod in groups.items():
        assert pod["metadata"]["labels"].items() >= policy_labels, name
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
    for name in ("gpus", "spot-gpus"):  # the end is announced first, and happens within the grace period
        pod = groups[name]["spec"]
        shell, flag, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        announcement, stop = script.split("; ")
        assert (shell, flag, stop) == ("/bin/sh", "-c", "ray stop")
        args = build_parser().parse_args(shlex.split(announcement)[1:])
        assert (args.action, args.wait) == ("leave", True)
        assert args.seconds < pod["terminationGracePeriodSeconds"]


def test_the_network_policy_admits_only_the_cluster_operator_and_submitter() -> None:
    policy = load("kuberay/networkpolicy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    cluster_rule, other_rule = policy["ingress"]
    assert cluster_rule == {"from": [{"podSelector": policy["podSelector"]}]}
    assert {port["port"] for port in other_rule["ports"]} == {8265}
    # never a whole namespace or the world
    assert all("podSelector" in source for source in other_rule["from"])
    operator, submitter = [source["podSelector"]["matchLabels"] for source in other_rule["from"]]
    # the only label that the pods of the operator's Helm chart and kustomize manifests have in common
    assert operator == {"app.kubernetes.io/component": "kuberay-operator"}
    # Kubernetes labels a Job's pods with the Job's name; KubeRay gives it the RayJob's name
    assert submitter == {"job-name": load("kuberay/rayjob.yaml")["metadata"]["name"]}


def test_compose_publishes_on_loopback_only_and_refuses_to_start_without_secrets() -> None:
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


def test_compose_divides_the_cpus_of_the_machine() -> None:
    """Without --num-cpus each worker would claim all of them: Ray counts the machine's CPUs, not the container's."""
    services = load("compose.yaml")["services"]
    filled = dict(line.split("=") for line in (INFRA / ".env.example").read_text().split() if "=" in line)
    total = 1  # for MLflow and S3
    for service in services.values():
        if not service["command"].startswith("ray start"):
            continue
        deploy = service.get("deploy", {})
        (cpus,) = re.findall(r"--num-cpus (\S+)", service["command"])
        assert cpus == deploy.get("resources", {}).get("limits", {}).get("cpus", "1")
        numbers = []
        for text in (cpus, str(deploy.get("replicas", 1))):
            variable = re.fullmatch(r"\$\{(\w+):-(\d+)\}", text)
            assert variable is None or filled[variable[1]] == variable[2]
            numbers.append(int(variable[2] if variable else text))
        total += numbers[0] * numbers[1]
    (documented,) = re.findall(r"one machine with Docker, (\d+) cores", (INFRA / "README.md").read_text())
    assert total == int(documented)


def test_compose_gives_all_gpus_to_one_worker() -> None:
    """Each of two replicas would claim all of them."""
    deploy = load("compose.gpu.yaml")["services"]["worker"]["deploy"]
    (device,) = deploy["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert deploy["replicas"] == 1


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A mocked EC2 client. HOME is temporary because Ray writes a key pair there."""
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
    config: dict[str, Any] = bootstrap_aws(prepared)
    return config


@pytest.mark.slow
def test_aws_is_closed_except_for_ssh_and_has_no_keys(ec2: Any) -> None:
    """Ray's own bootstrap uses the existing security group, without changing it, and creates no other."""
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
    assert not any("pip install" in command for command in commands)  # Ray's defaults install a nightly build


def test_aws_refuses_to_start_without_the_security_group(
    ec2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        bootstrap(load("aws.yaml"))
    assert "Failed to detect a security group" in capsys.readouterr().err


def test_aws_workers_announce_their_shutdown_after_a_spot_notice(tmp_path: Path) -> None:
    """Runs the command as Ray does, with fake wget, sleep and inpaint: the metadata has no notice at first, then one."""
    (watch,) = [line for line in load("aws.yaml")["worker_start_ray_commands"] if "instance-action" in line]
    announced, requested = tmp_path / "announced", tmp_path / "requested"
    programs = {
        "sleep": "exit 0",
        "wget": f"""echo "$@" >> {requested}
case "$*" in
*--method=PUT*api/token) echo TOKEN ;;
*"token: TOKEN"*instance-action) test $(wc -l < {requested}) -gt 4 && echo '{{"action": "terminate"}}' || exit 8 ;;
*) exit 4 ;;
esac""",
        "inpaint": f'echo "$@" > {announced}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = watch.replace("/tmp/notice.log", str(tmp_path / "notice.log"))
    assert command != watch
    (wrapped,) = with_head_node_ip([command], "10.0.0.1")
    start = time.monotonic()
    subprocess.run(
        ["bash", "-c", f"({wrapped})"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        timeout=30,
    )
    assert time.monotonic() - start < 10  # it runs in the background
    while not (announced.exists() and announced.read_text()):
        assert time.monotonic() - start < 30
        time.sleep(0.05)
    assert len(requested.read_text().splitlines()) == 6  # a token and a poll, three times
    args = build_parser().parse_args(shlex.split(announced.read_text()))
    assert (args.action, args.address) == ("leave", "10.0.0.1:6379")
    assert args.seconds < 120


def test_the_example_secret_is_invalid_and_filled_ones_are_ignored_by_git() -> None:
    secret = load("kuberay/secrets.example.yaml")
    assert secret["metadata"]["name"] == "inpaint-credentials"
    # the API server accepts strings only
    assert all(isinstance(value, list) for value in secret["stringData"].values())
    names = ["infra/kuberay/secrets.yaml", "infra/.env", "credentials.env", "services/s3.env", "s3/s3.env"]
    names += ["mlflow/mlflow.env"]
    for name in names:
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode in (0, 128), name
    for name in ("infra/.env.example", "infra/kuberay/secrets.example.yaml", "pipelines/mlflow/x.py"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode, name


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(r"(?i)(password|secret|token|key_id)[\w-]*\s*[:=]\s*[\"']?([A-Za-z0-9+/]{16,})")
    for path in [*files(), ROOT / "tests/infra/filled.env"]:
        if path.suffix != ".md":
            assert not secret.search(path.read_text()), path


def texts() -> dict[str, str]:
    """{name: text} of everything that people copy commands from: Markdown pages, comments of YAML files and `inpaint submit
    --help`, with continued lines joined."""
    pages = (*(ROOT / "docs").glob("*.md"), *INFRA.glob("*.md"))
    by_name = {path.relative_to(ROOT).as_posix(): path.read_text() for path in pages}
    for path in INFRA.rglob("*.yaml"):
        comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        by_name[path.relative_to(ROOT).as_posix()] = "\n".join(comments)
    with redirect_stdout(StringIO()) as output, suppress(SystemExit):
        build_parser().parse_args(["submit", "--help"])
    by_name["submit --help"] = output.getvalue()
    return {name: re.sub(r"\s+#.*", "", text).replace("\\\n", " ") for name, text in by_name.items()}


def commands() -> list[str]:
    """Every `inpaint ...` command in infra's files, and every submission."""
    commands = []
    for name, text in texts().items():
        if name.startswith("infra/"):
            commands += re.findall(
                r"(?m)(?:^|[ `])(inpaint (?:run|services|plan|submit|cluster)[^`&\n]*)", text
            )
    compose = load("compose.yaml")["services"]
    commands += [
        service["command"] for service in compose.values() if service["command"].startswith("inpaint")
    ]
    commands += submissions()
    return sorted({command.strip() for command in commands if "RECIPE" not in command})


def submissions() -> list[str]:
    """The commands that run on another machine, as `inpaint ...`."""
    submitted = [load("kuberay/rayjob.yaml")["spec"]["entrypoint"]]
    for text in texts().values():
        submitted += re.findall(r"(?m)(?:^|[ `])(inpaint submit \w[^`&\n]*)", text)
        jobs = re.findall(r"ray job submit .* -- (?:python -m pipelines|inpaint) (run [^`&\n]*)", text)
        submitted += [f"inpaint {job}" for job in jobs]
    # the others are for a cluster on this machine
    return sorted({command.strip() for command in submitted if "s3://" in command})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_infra_parses_and_its_recipe_loads(command: str) -> None:
    words = shlex.split(command)[1:]
    if words in (["run"], ["services"], ["submit"]):
        return  # mentioned in a sentence
    args = build_parser().parse_args(words)
    if getattr(args, "recipe", None):
        load_recipe(args.recipe, args.set)


def test_every_documented_submission_is_found() -> None:
    documented = {name for name, text in texts().items() if re.search(r"inpaint submit \w+ --", text)}
    files = {"infra/README.md", "infra/aws.yaml", "infra/kuberay/raycluster.yaml"}
    assert documented == {"docs/clusters.md", "submit --help", *files}
    assert any("edge_connect" in command for command in submissions())  # by `ray job submit`


@pytest.mark.parametrize("command", submissions())
def test_submitted_recipes_work_on_a_cluster(command: str) -> None:
    """The recipe has no local paths, and a recipe of a paper's full size uses a GPU."""
    args = build_parser().parse_args(shlex.split(command)[1:])
    recipe = recipe_from_args(args)
    assert recipe.storage.startswith("s3://")
    _, notes = make_portable(recipe, "http://head.example:8265")
    assert not notes
    if f"{args.recipe}-small" in shipped_recipes():
        assert recipe.scaling.gpus_per_worker >= 1


def test_on_spot_machines_training_survives_many_lost_workers() -> None:
    spot = [load("kuberay/rayjob.yaml")["spec"]["entrypoint"]]
    for name in ("infra/aws.yaml", "infra/kuberay/raycluster.yaml", "infra/README.md"):
        spot += re.findall(r"inpaint submit deepfill_v2 [^`&\n]*", texts()[name])
    assert len(spot) == 5
    for command in spot:
        words = shlex.split(command)[1:]
        assert recipe_from_args(build_parser().parse_args(words)).scaling.max_failures == 100


NON_RETURNING = (
    "inpaint services",
    "ray dashboard",
    "kubectl port-forward",
    "kubectl logs -f",
    "docker compose up",
)
RETURNING = r" --detach\b|^inpaint services (status|stop)\b"


@pytest.mark.parametrize("page", [ROOT / "docs/clusters.md", INFRA / "README.md"], ids=["docs", "infra"])
def test_nothing_follows_a_command_that_does_not_return(page: Path) -> None:
    """In a block that can be pasted as a whole. Background commands need time to start, so only others of them follow."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines()]
        non_returning = [
            line for line in lines if line.startswith(NON_RETURNING) and not re.search(RETURNING, line)
        ]
        if non_returning:
            assert all(line.endswith("&") for line in non_returning) or non_returning == lines[-1:], block
            assert lines[-1] == non_returning[-1], block


def test_runs_in_the_compose_cluster_join_it() -> None:
    """Without RAY_ADDRESS `inpaint run` would start a local Ray."""
    text = (INFRA / "README.md").read_text()
    commands = [line for line in text.splitlines() if "exec" in line and "inpaint run" in line]
    assert commands
    assert all("-e RAY_ADDRESS=auto" in line for line in commands)


def validator() -> Any:
    spec = importlib.util.spec_from_file_location("validate", INFRA / "validate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_validator_finds_unknown_fields_and_wrong_types(tmp_path: Path) -> None:
    """With a small CRD that lacks most fields of our manifests."""
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
                    # without properties: the API server removes all fields
                    "authOptions": {"type": "object"},
                },
            },
        },
    }
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    crd = {"spec": {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": versions}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    problems = validator().find_problems(tmp_path)
    assert any("spec.rayVersion" in line and "not of type 'integer'" in line for line in problems)
    assert any("headGroupSpec" in line and "unexpected" in line for line in problems)
    assert any("spec.authOptions" in line for line in problems)
    assert "has no CRD" in validator().find_problems(tmp_path / "none")[0]
