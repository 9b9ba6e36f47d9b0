"""The fields of KubeRay 1.7 that the manifests in `deploy/` use, as JSON schemas.

They follow the Go types of ray-operator/apis/ray/v1 in the repository ray-project/kuberay, whose custom resource
definitions are generated from them. Unlike a Kubernetes API server, which drops unknown fields, they refuse every field
that is not listed: a new field in a manifest has to be looked up there, and added here.
"""

from typing import Any

VERSION = "1.7.0"
AUTHENTICATION_SINCE = (2, 52)
"""`authOptions` needs this version of Ray."""
MAX_NAME_LENGTH = 47
"""KubeRay refuses longer names of jobs and services, since it appends to them."""

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
NAME = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i?|[mk])?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def record(*required: str, **fields: Any) -> dict[str, Any]:
    """An object with exactly these fields."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def array(items: dict[str, Any]) -> dict[str, Any]:
    """A list of at least one of these."""
    return {"type": "array", "items": items, "minItems": 1}


VARIABLES = array(record("name", "value", name=TEXT, value={"type": "string"}))
CONTAINER = record(
    "name",
    "image",
    "resources",
    name=NAME,
    image=TEXT,
    resources=record("requests", "limits", requests=QUANTITIES, limits=QUANTITIES),
    ports=array(record("name", "containerPort", name=NAME, containerPort=COUNT)),
    env=VARIABLES,
    envFrom=array(record("secretRef", secretRef=record("name", name=NAME, optional={"type": "boolean"}))),
)
TOLERATION = record(
    "key",
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
TEMPLATE = record(
    "spec",
    spec=record("containers", containers=array(CONTAINER), nodeSelector=TEXTS, tolerations=array(TOLERATION)),
)
HEAD = record("template", template=TEMPLATE, rayStartParams=TEXTS, labels=TEXTS)
WORKERS = record(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
    groupName=NAME,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    priority={"type": "integer"},
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
AUTOSCALER = record(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, env=VARIABLES)
CLUSTER = record(
    "rayVersion",
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs=array(WORKERS),
)
JOB = record(
    "entrypoint",
    "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=record(backoffLimit=COUNT),
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)
SERVICE = record("serveConfigV2", "rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=CLUSTER)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A whole manifest."""
    return record(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=record("name", name={**NAME, "maxLength": MAX_NAME_LENGTH}),
        spec=spec,
    )


RESOURCES = {
    kind: resource(kind, spec) for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB), ("RayService", SERVICE))
}
