"""What the tests of a process share: one Ray instance and one small pictogram web site."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.update(  # before anything imports ray
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TMPDIR": tempfile.gettempdir(),  # socket paths must stay short
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OVD_REQUEST_SECONDS": "5",  # time limit of HAProxy on a request's arrival
    }
)

import pytest

from data_prep.pictograms import webserver, website


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray instance with more CPUs on paper than the machine has, so that pools never wait for each other."""
    import ray

    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a web site of 120 pictures and 60 scenes with at least one row of every fault."""
    root = tmp_path_factory.mktemp("site")
    website.build_site(root, num_pictures=120, num_scenes=60)
    return root


@pytest.fixture(scope="session")
def served_site(small_site: Path) -> Iterator[str]:
    """Base URL of that site, served for the whole session; its list is at `small_site / "urls.tsv"`."""
    with webserver.serve_site(small_site) as base_url:
        yield base_url
