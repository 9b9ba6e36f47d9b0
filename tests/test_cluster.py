import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())
TYPES = CLUSTER["available_node_types"]


def changed(**values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CLUSTER), **values}


def test_ray_accepts_the_cluster() -> None:
    validate_config(prepare_config(changed()))


@pytest.mark.parametrize("fault", [{"idle_minutes": 5}, {"max_workers": "many"}, {"head_node_type": "boss"}])
def test_ray_refuses_a_broken_one(fault: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(changed(**fault)))


@pytest.mark.parametrize("name", [name for name in TYPES if name != CLUSTER["head_node_type"]])
def test_pools_shrink_to_nothing_and_have_a_limit(name: str) -> None:
    assert TYPES[name]["min_workers"] == 0
    assert 0 < TYPES[name]["max_workers"] <= CLUSTER["max_workers"]
    assert CLUSTER["idle_timeout_minutes"] > 0


def test_pools_together_fill_the_cluster() -> None:
    assert sum(entry.get("max_workers", 0) for entry in TYPES.values()) == CLUSTER["max_workers"]


def test_resources_are_whole_numbers() -> None:
    for entry in TYPES.values():
        assert all(isinstance(count, int) for count in entry["resources"].values())


def test_head_runs_no_tasks_and_is_never_a_spot_node() -> None:
    head = TYPES[CLUSTER["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_data_pool_is_spot_and_training_pool_has_gpus() -> None:
    assert TYPES["data_cpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert TYPES["train_gpu"]["resources"]["GPU"] >= 1
    assert "gpu" in TYPES["train_gpu"]["docker"]["worker_image"]


def test_nothing_is_installed_while_a_node_starts() -> None:
    for name in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert CLUSTER[name] == []


def test_head_is_reached_with_a_token_and_not_from_outside() -> None:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in CLUSTER[name][-1]
    assert "--dashboard-host=127.0.0.1" in CLUSTER["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]
