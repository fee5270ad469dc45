"""deploy/kubernetes: manifests that Kubernetes' own schemas take, and that agree with the program."""

import re
import subprocess

import kubernetes_validate
import pytest
import yaml
from live_server import PROGRAM, ROOT, Server

from flash_mla_kernels.dynamo import arguments

FILE = ROOT / "deploy/kubernetes/flash-mla.yaml"
DYNAMO = ROOT / "deploy/kubernetes/dynamo.yaml"
KINDS = ["Deployment", "Service", "HorizontalPodAutoscaler"]


def manifests():
    return {m["kind"]: m for m in yaml.safe_load_all(FILE.read_text())}


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_takes_it(kind):
    kubernetes_validate.validate(manifests()[kind], "1.31", strict=True)


def of_dynamo(kind):
    return {m["metadata"]["name"]: m for m in yaml.safe_load_all(DYNAMO.read_text()) if m["kind"] == kind}


def test_the_schema_takes_dynamos():
    manifests = list(yaml.safe_load_all(DYNAMO.read_text()))
    assert [m["kind"] for m in manifests].count("Deployment") == 4
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_dynamos_parts_fit_together():
    deployments, services = of_dynamo("Deployment"), of_dynamo("Service")
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe not in container or container[probe]["httpGet"]["port"] in ports
    for name, service in services.items():
        assert service["spec"]["selector"].items() <= deployments[name]["spec"]["template"]["metadata"]["labels"].items()
    (etcd,) = services["dynamo-etcd"]["spec"]["ports"]
    for name in ("dynamo-frontend", "flash-mla-prefill", "flash-mla-decode"):
        (container,) = deployments[name]["spec"]["template"]["spec"]["containers"]
        env = {e["name"]: e.get("value") for e in container["env"]}
        assert env["ETCD_ENDPOINTS"] == f"http://dynamo-etcd:{etcd['port']}"
        assert "$(POD_IP)" in [*container["args"], *env.values()] or "--host=$(POD_IP)" in container["args"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_dynamos_workers_take_the_flags(role, monkeypatch):
    pod = of_dynamo("Deployment")[f"flash-mla-{role}"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    env = {e["name"]: e.get("value", "") for e in container["env"]} | {"POD_IP": "10.0.0.7"}
    for name in [*env, *(f"DYN_{plane}_HOST" for plane in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM"))]:
        monkeypatch.setenv(name, env.get(name, "x"))  # so that what parse() sets goes afterwards
        if name not in env:
            monkeypatch.delenv(name)
    options = arguments.parse([a.replace("$(POD_IP)", env["POD_IP"]) for a in container["args"]])
    assert options.disaggregation_mode == role
    assert (options.discovery_backend, options.request_plane, options.event_plane) == ("etcd", "tcp", "zmq")
    assert options.bootstrap_host == "10.0.0.7"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["system"]) == env["DYN_SYSTEM_PORT"] == pod["metadata"]["annotations"]["prometheus.io/port"]
    assert role == "decode" or ports["bootstrap"] == options.bootstrap_port


def test_the_schema_refuses_what_is_wrong():
    wrong = manifests()["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_parts_fit_together():
    found = manifests()
    assert list(found) == KINDS
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    for selector in (found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]):
        assert selector.items() <= labels.items()
    (port,) = container["ports"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["spec"]["volumes"]}
    # The image of deploy/Dockerfile: its user, its port.
    image = (ROOT / "deploy/Dockerfile").read_text()
    assert f"--uid {pod['spec']['securityContext']['runAsUser']} " in image
    assert f"EXPOSE {port['containerPort']}\n" in image


def test_the_program_has_the_flags_routes_and_metrics():
    found = manifests()
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    usage = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True, timeout=300, check=True).stdout
    for argument in container["args"]:
        assert re.search(rf"{argument.partition('=')[0]}\b", usage), argument
    for variable in container["env"]:
        assert variable["name"] in usage
    routes = (ROOT / "src/server/routes.cpp").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in routes
    metrics = (ROOT / "src/server/metrics.cpp").read_text()
    for metric in found["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        assert f'"{metric["pods"]["metric"]["name"]}"' in metrics


def test_gateways_find_load_under_vllms_names():
    server = Server(ROOT / "models/small", num_pages=40)
    for ours, theirs in (
        ("mla_sequences_running", "vllm:num_requests_running"),
        ("mla_sequences_waiting", "vllm:num_requests_waiting"),
        ("mla_mem_utilization", "vllm:kv_cache_usage_perc"),
    ):
        assert server.metric(f'{theirs}{{model_name="small"}}') == server.metric(ours) == 0
    assert server.metric('vllm:cache_config_info{block_size="64",num_gpu_blocks="40"}') == 1
    assert server.stop() == 0
