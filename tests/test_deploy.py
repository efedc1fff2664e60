"""deploy/: the files agree with each other, with kvlab's settings and metrics, and with vLLM's; no container is run."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from kvlab.connectors import vllm_config
from kvlab.machine.servers import unpacked
from tests.support.examples import serve_lines, with_files

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
KINDS = ("_total", "_bucket", "_sum", "_count")  # what Prometheus appends to a metric's name
# What a service may hold, and what it must.
SERVICE = {
    "build", "image", "command", "ports", "ipc", "ulimits", "volumes", "secrets", "stop_grace_period", "restart",
    "depends_on", "healthcheck", "deploy", "cap_drop", "environment",
}  # fmt: skip


def rules():
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def dashboard():
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))


def expressions():
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield re.sub(r"\$__\w+", "5m", target["expr"])  # Grafana puts a duration there


def metrics_of_kvlab():
    """Names as Prometheus has them: counters end in _total, histograms in three ways, gauges in none."""
    tree = ast.parse((ROOT / "kvlab/connectors/vllm/metrics.py").read_text(encoding="utf-8"))
    tables = {
        node.targets[0].id: set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("DOCUMENTATION", "TIER_COUNTERS", "TIER_GAUGES")
    }
    counters = tables["DOCUMENTATION"] | tables["TIER_COUNTERS"] | {"loaded_bytes", "misses"}
    histogram = {f"{name}{kind}" for name in ("load_seconds", "quality_error") for kind in KINDS[1:]}
    return {f"vllm:kvlab_{name}" for name in {f"{name}_total" for name in counters} | histogram | tables["TIER_GAUGES"]}


def metrics_of_vllm():
    package = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    return {name for path in (package / "v1").rglob("*.py") for name in re.findall(r'"(vllm:\w+)"', path.read_text())}


def test_services_hold_what_compose_knows():
    assert set(COMPOSE) == {"name", "services", "volumes", "secrets"}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= SERVICE, name
        assert ("image" in service) != ("build" in service), name
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"]), name
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"]), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), volume


def test_compose_accepts_the_file_and_reads_what_stands_in_it():
    tool = unpacked("docker-compose")
    assert tool, "no docker-compose found; python scripts/get_servers.py"
    command = [tool, "-f", str(DEPLOY / "compose.yaml"), "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    read = json.loads(done.stdout)
    assert read["name"] == COMPOSE["name"]
    assert set(read["services"]) == set(COMPOSE["services"])
    for name, service in COMPOSE["services"].items():
        assert len(read["services"][name].get("ports", [])) == len(service.get("ports", [])), name


def test_images_have_a_version():
    images = [service["image"] for service in COMPOSE["services"].values() if "image" in service]
    images += re.findall(r"^ARG \w+=(\S+)", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert images
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []


def test_ports_are_open_to_this_machine_only():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_secrets_come_from_files_that_git_ignores():
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_the_container_copies_is_in_the_checkout():
    build = COMPOSE["services"]["vllm"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    for line in re.findall(r"^COPY (.+)$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line


def test_the_command_of_the_engine_holds_what_vllm_config_returns(tmp_path):
    words = COMPOSE["services"]["vllm"]["command"]
    given = json.loads(with_files(words[words.index("--kv-transfer-config") + 1], tmp_path))
    assert given == vllm_config(**given["kv_connector_extra_config"])


def test_an_engine_has_longer_to_stop_than_its_shutdown_takes():
    engine = COMPOSE["services"]["vllm"]
    timeout = int(engine["command"][engine["command"].index("--shutdown-timeout") + 1])
    assert int(engine["stop_grace_period"].removesuffix("s")) > timeout


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expressions_parse_and_name_metrics_that_exist(expression):
    promql_parser.parse(expression)
    ours, theirs = metrics_of_kvlab(), metrics_of_vllm()
    for name in re.findall(r"vllm:\w+", expression):
        bare = next((name.removesuffix(kind) for kind in KINDS if name.endswith(kind)), name)
        assert name in ours if "kvlab" in name else {bare, name} & theirs, name


def test_every_metric_of_kvlab_is_in_the_dashboard_or_a_rule():
    text = " ".join(expressions())
    unseen = {name for name in metrics_of_kvlab() if not re.search(rf"{name}\b", text)}
    assert unseen <= {"vllm:kvlab_load_seconds_count"}


@pytest.mark.parametrize(("kind", "file"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_prometheus_accepts(kind, file, tmp_path):
    """By its own checker, with the paths of the container under `tmp_path`."""
    tool = unpacked("promtool")
    assert tool, "no promtool found; python scripts/get_servers.py"
    for name in ("alerts.yml", "prometheus.yml"):
        text = (DEPLOY / name).read_text(encoding="utf-8").replace("/etc/prometheus", str(tmp_path))
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run([tool, "check", kind, str(tmp_path / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_prometheus_reads_the_rules_and_asks_the_engine():
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["prometheus"]["volumes"]]
    assert set(config["rule_files"]) <= set(mounted)
    (job,) = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"]
    assert any(published.endswith(f":{port}") for published in COMPOSE["services"][host]["ports"])


def test_alerts_are_named_once_in_the_guide():
    guide = (ROOT / "docs" / "guide" / "operate.md").read_text(encoding="utf-8")
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"^\| `(\w+)` \|", guide, re.MULTILINE))


def test_panels_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.slow
def test_vllm_parses_every_command_of_the_docs_and_of_compose():
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before vLLM 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    lines = [words for _, words in serve_lines()]
    lines.append(["${MODEL}", *COMPOSE["services"]["vllm"]["command"][1:]])
    assert len(lines) > 4
    parser = make_arg_parser(FlexibleArgumentParser())
    for words in lines:
        parsed = parser.parse_args(words)
        assert parsed.kv_transfer_config, shlex.join(words)
