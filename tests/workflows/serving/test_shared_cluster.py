"""The script on a cluster that serves other applications too."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from head_node import free_ports
from serving import save_detector

from ovd_models.errors import InputError
from workflows import serve

from ray import serve as ray_serve  # isort: skip  # after what sets its environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@ray_serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    """Somebody else's application."""

    def __call__(self) -> str:
        """Answer."""
        return "other"


@pytest.fixture
def port(ray_cluster: None) -> Iterator[int]:
    """Where Ray Serve listens, with one application of others."""
    (port,) = free_ports(1)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(Other.bind(), name="other", route_prefix="/other")
    yield port
    ray_serve.shutdown()


def test_applications_of_others_outlive_the_script(port: int, tmp_path: Path) -> None:
    run = serve.Run(model=str(save_detector(tmp_path / "model")), storage=str(tmp_path), port=0)
    with serve.serve_model(run) as url:
        assert url == f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    assert set(ray_serve.status().applications) == {"other"}
    assert ray_serve.get_app_handle("other").remote().result() == "other"
    ray_serve.run(Other.bind(), name="ovd", route_prefix="/ovd")
    with pytest.raises(InputError, match="already serves an application 'ovd'"), serve.serve_model(run):
        pass
    assert set(ray_serve.status().applications) == {"other", "ovd"}
