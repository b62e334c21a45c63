"""A repository's manifests for a cluster: plain Kubernetes objects, and a KServe InferenceService. As JSON, which is YAML too."""

import json
from pathlib import Path
from typing import Any

from exports.triton_config import TritonSpec

IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"
"""The server's own image; the python models also want NumPy, OpenCV (headless) and Pillow, see docs/exports.md."""
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
CLAIM = "models"
"""Volume claim that holds the repository; whoever runs the cluster fills it."""
HEALTH = "/v2/health"


def write_manifests(folder: Path, spec: TritonSpec, name: str) -> None:
    """kubernetes.yaml and inferenceservice.yaml in `folder`."""
    label = dns_name(name)
    objects = {
        "kubernetes.yaml": {
            "apiVersion": "v1",
            "kind": "List",
            "items": [deployment(label, spec), service(label), scaler(label)],
        },
        "inferenceservice.yaml": inference_service(label, spec),
    }
    for file, content in objects.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def dns_name(name: str) -> str:
    """A name as Kubernetes allows it: lower-case letters, digits and hyphens, a letter first."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return f"dinoscope-{plain}"[:50].rstrip("-")


def container(spec: TritonSpec) -> dict[str, Any]:
    """Triton on the mounted repository, ready when every model is."""
    cores = spec.instances * spec.threads + spec.decode_instances
    limits: dict[str, Any] = {"cpu": str(cores), "memory": "8Gi"}
    if spec.device == "gpu":
        limits["nvidia.com/gpu"] = "1"
    return {
        "name": "triton",
        "image": IMAGE,
        "args": ["tritonserver", "--model-repository=/models", "--strict-readiness=true", "--exit-timeout-secs=30"],
        "ports": [{"name": key, "containerPort": port} for key, port in PORTS.items()],
        "readinessProbe": {"httpGet": {"path": f"{HEALTH}/ready", "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": f"{HEALTH}/live", "port": "http"}, "periodSeconds": 10},
        "startupProbe": {
            "httpGet": {"path": f"{HEALTH}/ready", "port": "http"},
            "failureThreshold": 60,
            "periodSeconds": 5,
        },
        "resources": {"requests": {"cpu": str(cores), "memory": "4Gi"}, "limits": limits},
        "volumeMounts": [
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def deployment(name: str, spec: TritonSpec) -> dict[str, Any]:
    """Two servers that replace each other one at a time."""
    labels = {"app.kubernetes.io/name": name}
    pod = {
        "terminationGracePeriodSeconds": 45,
        "containers": [container(spec)],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": CLAIM, "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def service(name: str) -> dict[str, Any]:
    """One address for all of them; headless, so that gRPC clients see each server and can spread their calls."""
    ports = [{"name": key, "port": port, "targetPort": key} for key, port in PORTS.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
        "spec": {"clusterIP": "None", "selector": {"app.kubernetes.io/name": name}, "ports": ports},
    }


def scaler(name: str) -> dict[str, Any]:
    """More servers while their processors are busy."""
    busy = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 75}},
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": 2,
            "maxReplicas": 8,
            "metrics": [busy],
        },
    }


def inference_service(name: str, spec: TritonSpec) -> dict[str, Any]:
    """The same under KServe, whose Triton runtime serves the repository from a volume."""
    triton = container(spec)
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "maxReplicas": 8,
                "scaleMetric": "cpu",
                "scaleTarget": 75,
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "runtime": "kserve-tritonserver",
                    "storageUri": f"pvc://{CLAIM}/",
                    "resources": triton["resources"],
                },
            }
        },
    }
