"""What Ray's autoscaler would start for a cluster, without any cloud."""

from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil


def nodes_to_add(
    config: dict[str, Any], demand: dict[str, float], count: int, failed: tuple[str, ...] = ()
) -> dict[str, int]:
    """The worker nodes, by type, that the autoscaler starts while nothing runs.

    Args:
        config: of a cluster, with Ray's defaults filled in.
        demand: resources of one task or actor that waits.
        count: how many of them wait.
        failed: node types of which a node was asked for and did not come up in time.
    """
    cluster = AutoscalingConfig(config, skip_content_hash=True)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=cluster.get_node_type_configs(),
            max_num_nodes=cluster.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)] * count),
            recoverable_resource_availabilities=dict.fromkeys(failed, 0.0),
        )
    )
    started = {request.instance_type: request.count for request in reply.to_launch}
    return {name: number for name, number in started.items() if name != cluster.get_head_node_type()}
