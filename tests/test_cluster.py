"""The clusters that `ray up` starts: their files pass Ray's own checks, and what those do not see."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from autoscaling import nodes_to_add
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTERS = {name: yaml.safe_load((ROOT / name).read_text()) for name in ("cluster.yaml", "deploy/cluster-gcp.yaml")}
every_cluster = pytest.mark.parametrize("name", CLUSTERS)


def changed(name: str, **values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CLUSTERS[name]), **values}


@every_cluster
def test_ray_accepts_the_cluster(name: str) -> None:
    validate_config(prepare_config(changed(name)))


@every_cluster
@pytest.mark.parametrize("fault", [{"idle_minutes": 5}, {"max_workers": "many"}, {"head_node_type": "boss"}])
def test_ray_refuses_a_broken_one(name: str, fault: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(changed(name, **fault)))


@every_cluster
def test_numbers_of_nodes_and_resources_agree(name: str) -> None:
    cluster = CLUSTERS[name]
    workers = {kind: node for kind, node in cluster["available_node_types"].items() if kind != "head"}
    for node in workers.values():
        assert 0 <= node["min_workers"] <= node["max_workers"]
        assert all(type(amount) is int and amount >= 0 for amount in node["resources"].values())
    assert cluster["max_workers"] == sum(node["max_workers"] for node in workers.values())
    assert sum(node["min_workers"] for node in workers.values()) == 0  # an idle cluster is its head alone
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


@every_cluster
def test_gpu_nodes_have_gpus_and_their_image(name: str) -> None:
    for node in CLUSTERS[name]["available_node_types"].values():
        image = node.get("docker", {}).get("worker_image", CLUSTERS[name]["docker"]["image"])
        gpus = node["resources"].get("GPU", 0)
        assert image.endswith("-gpu" if gpus else "-cpu")
        assert (node.get("docker", {}).get("worker_run_options") == ["--gpus=all"]) == bool(gpus)


def is_spot(config: Mapping[str, Any]) -> bool:
    return "InstanceMarketOptions" in config or config.get("scheduling", {}).get("provisioningModel") == "SPOT"


@every_cluster
def test_data_and_preferred_gpu_nodes_are_spot(name: str) -> None:
    kinds = CLUSTERS[name]["available_node_types"]
    assert {kind for kind in kinds if is_spot(kinds[kind]["node_config"])} == {"data_cpu", "train_gpu_spot"}


@every_cluster
def test_ray_prefers_spot_gpus_and_then_takes_on_demand(name: str) -> None:
    config = prepare_config(changed(name))
    assert nodes_to_add(config, {"GPU": 1, "CPU": 4}, 8) == {"train_gpu_spot": 2}
    assert nodes_to_add(config, {"GPU": 1, "CPU": 4}, 24) == {"train_gpu_spot": 4, "train_gpu": 2}
    config["available_node_types"]["train_gpu"]["priority"] = 2
    assert nodes_to_add(config, {"GPU": 1, "CPU": 4}, 8) == {"train_gpu": 2}
    assert nodes_to_add(config, {"CPU": 1}, 20) == {"data_cpu": 2}


def test_both_clouds_have_the_same_nodes() -> None:
    def described(name: str) -> dict[str, Any]:
        kinds = CLUSTERS[name]["available_node_types"]
        skipped = ("node_config", "initialization_commands")
        return {kind: {key: value for key, value in kinds[kind].items() if key not in skipped} for kind in kinds}

    aws, google = CLUSTERS.values()
    assert described("cluster.yaml") == described("deploy/cluster-gcp.yaml")
    for key in ("docker", "max_workers", "idle_timeout_minutes", "file_mounts", "head_start_ray_commands"):
        assert aws[key] == google[key]


@every_cluster
def test_every_node_starts_with_the_token(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
