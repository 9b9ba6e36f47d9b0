import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())


def changed(**values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CLUSTER), **values}


def test_ray_accepts_the_cluster() -> None:
    validate_config(prepare_config(changed()))


@pytest.mark.parametrize("fault", [{"idle_minutes": 5}, {"max_workers": "many"}, {"head_node_type": "boss"}])
def test_ray_refuses_a_broken_one(fault: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(changed(**fault)))
