"""`deploy/`: manifests of Kubernetes, the served application and the images agree with each other and with the code."""

import copy
import fnmatch
import os
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import kuberay
import pytest
import yaml
from autoscaling import nodes_to_add
from pydantic import TypeAdapter
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from workflows import serve
from workflows.serving import environment

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CLUSTER, JOB, SERVICE = (
    yaml.safe_load((DEPLOY / f"{name}.yaml").read_text()) for name in ("raycluster", "rayjob", "rayservice")
)
MANIFESTS = {manifest["kind"]: manifest for manifest in (CLUSTER, JOB, SERVICE)}
SPECS = {
    "RayCluster": CLUSTER["spec"],
    "RayJob": JOB["spec"]["rayClusterSpec"],
    "RayService": SERVICE["spec"]["rayClusterConfig"],
}
APPLICATION = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
VERSIONS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
every_manifest = pytest.mark.parametrize("kind", MANIFESTS)


@every_manifest
def test_kuberay_knows_all_fields(kind: str) -> None:
    jsonschema.validate(MANIFESTS[kind], kuberay.RESOURCES[kind])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rayVersion", 2.6),
        ("authOptions", {"mode": "password"}),
        ("autoscalerOptions", {"version": "v3"}),
        ("autoscalerOptions", {"idleTimeoutMinutes": 10}),
        ("workerGroups", []),
        (
            "headGroupSpec",
            {"rayStartParams": {"num-cpus": 0}, "template": CLUSTER["spec"]["headGroupSpec"]["template"]},
        ),
    ],
)
def test_a_wrong_field_is_refused(field: str, value: Any) -> None:
    broken = copy.deepcopy(CLUSTER)
    broken["spec"][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, kuberay.RESOURCES["RayCluster"])


@every_manifest
def test_rules_of_kuberay_beyond_its_schema_hold(kind: str) -> None:
    spec = SPECS[kind]
    assert spec["rayVersion"] == VERSIONS["ray"]
    assert tuple(map(int, spec["rayVersion"].split(".")))[:2] >= kuberay.AUTHENTICATION_SINCE
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"  # priorities of groups need it
    groups = spec["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert group["minReplicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert container["image"].endswith("-gpu" if gpus else "-cpu")
        assert container["resources"]["requests"] == container["resources"]["limits"]  # GPUs have to be equal
        head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert (container["env"], container["envFrom"]) == (head["env"], head["envFrom"])


def test_the_job_has_the_same_cluster_and_ends_with_it() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]
    assert JOB["spec"]["shutdownAfterJobFinishes"]  # else KubeRay refuses ttlSecondsAfterFinished


@every_manifest
def test_ray_reads_the_groups_and_prefers_spot(kind: str) -> None:
    manifest = {"metadata": {"name": "x", "namespace": "default"}, "spec": SPECS[kind]}
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    gpu = {"GPU": 1, "CPU": 4}
    if kind == "RayService":
        assert nodes_to_add(config, {"GPU": 1, "CPU": 1}, 2) == {"serve-gpu": 2}
        return
    assert nodes_to_add(config, gpu, 8) == {"train-gpu-spot": 2}
    assert nodes_to_add(config, gpu, 8, failed=("train-gpu-spot",)) == {"train-gpu": 2}
    assert nodes_to_add(config, {"CPU": 1}, 20) == {"data-cpu": 2}


def test_ray_serve_accepts_the_application() -> None:
    ServeDeploySchema.model_validate(APPLICATION)
    assert set(APPLICATION) <= set(ServeDeploySchema.model_fields)  # unknown fields pass the check
    (application,) = APPLICATION["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    module, attribute = application["import_path"].split(":")
    assert getattr(import_module(module), attribute) is serve.app
    run = TypeAdapter(serve.Run).validate_python(application["args"])
    assert set(application["args"]) <= set(vars(run))


def test_the_service_serves_the_same_application() -> None:
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == APPLICATION
    ports = SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": APPLICATION["http_options"]["port"]} in ports


def test_the_service_sets_haproxy_as_one_machine_does() -> None:
    own = environment.haproxy_environment()
    (container,) = SPECS["RayService"]["headGroupSpec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("RAY_SERVE_")}
    assert given.keys() <= own.keys()
    script = ROOT / Path(given.pop("RAY_SERVE_HAPROXY_BINARY_PATH")).relative_to("/home/ray/ovd-ray")
    assert os.access(script, os.X_OK)
    del given["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]  # longer: other nodes have proxies too
    assert given == {name: own[name] for name in given}


def test_names_of_images_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [ROOT / "cluster.yaml", *DEPLOY.iterdir(), ROOT / "docs/cluster.md", ROOT / "README.md"]
    named = {name for path in files for name in re.findall(r"[\w./-]*ovd-ray:[\w.-]+", path.read_text())}
    assert named == {f"your-registry/ovd-ray:{version}-{kind}" for kind in ("cpu", "gpu")}
    built = dict(re.findall(r"docker build .*?(?:PLATFORM=(\w+) )?-t \S+-(cpu|gpu) \.", DOCKERFILE))
    assert built == {"": "cpu", cuda(): "gpu"}
    page = (ROOT / "docs/cluster.md").read_text()
    assert all(command in page for command in re.findall(r"docker build .*", DOCKERFILE))


def cuda() -> str:
    """The platform in the tag of Ray's image that has the CUDA of our torch."""
    major, minor, *_ = VERSIONS["cuda-toolkit"].split(".")
    return f"cu{major}{minor}"


def test_images_have_the_versions_that_are_tested() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert base == f"rayproject/ray:{VERSIONS['ray']}-py311-${{PLATFORM}}"
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    installs = re.findall(r"pip install(?:[^&;]|\\\n)*", DOCKERFILE)
    assert installs
    assert all("-c constraints.txt" in command for command in installs)
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE) == ["ray"]


def test_images_hold_the_code() -> None:
    copied = [name for line in re.findall(r"^COPY --\S+ (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert set(packages) < set(copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert "*" in ignored
    assert any(fnmatch.fnmatch("workflows/__pycache__", pattern) for pattern in ignored[ignored.index("*") + 1 :])


def test_the_job_starts_a_named_config() -> None:
    assert shlex.split(JOB["spec"]["entrypoint"])[:2] == ["python", "workflows/codet.py"]
