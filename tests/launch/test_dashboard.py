"""The dashboard's specification against engine.metrics.writer, and what a stand-in for W&B's server is sent."""

import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from foreroute.engine.metrics.names import METRICS
from foreroute.engine.testing.ranks import Program
from foreroute.launch.dashboard import HEAT_MAPS, LEFT_OUT, SECTIONS, DashboardArgs, Panel, build, specification

NAMES = ["Throughput", "Exchange", "Experts", "Quality against compute", "Health"]


def faults(panel):
    """What a panel says that METRICS does not."""
    unknown = [name for name in (*panel.names, panel.x) if name not in METRICS and name != "Step"]
    if unknown:
        return [f"{panel.title}: no such metric {name}" for name in unknown]
    found = []
    if len({METRICS[name].unit for name in panel.names}) != 1:
        found.append(f"{panel.title}: units differ")
    if any(METRICS[name].axes for name in panel.names):
        if len(panel.names) > 1:
            found.append(f"{panel.title}: a metric with an axis has its panel alone")
        if "expert" in METRICS[panel.names[0]].axes:
            found.append(f"{panel.title}: lines cannot show experts")
    return found


def test_panels_name_metrics_that_exist():
    panels = [panel for section in SECTIONS.values() for panel in section]
    assert [fault for panel in panels for fault in faults(panel)] == []
    assert METRICS[HEAT_MAPS].axes == ("layer", "expert")


@pytest.mark.parametrize(
    "planted",
    [
        Panel("a", ("tokens_per_secnd",)),
        Panel("b", ("loss",), x="tokns"),
        Panel("c", ("loss", "bpc")),
        Panel("d", ("rank_own_ms", "step_ms")),
        Panel("e", ("expert_rows",)),
    ],
    ids=lambda panel: panel.title,
)
def test_planted_faults_are_seen(planted):
    assert faults(planted)


def test_every_metric_is_shown_or_left_out_for_a_reason():
    panels = [panel for section in SECTIONS.values() for panel in section]
    shown = {name for panel in panels for name in (*panel.names, panel.x)} - {"Step"} | {HEAT_MAPS}
    assert shown | set(LEFT_OUT) == set(METRICS)
    assert not shown & set(LEFT_OUT)
    ids = [(name, panel.title) for name, section in SECTIONS.items() for panel in section]
    assert len(set(ids)) == len(ids)


@pytest.fixture(scope="module")
def text():
    return specification(build(DashboardArgs(project="p", entity="team", layers=3)))


def panels_of(text):
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == NAMES
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_the_specification_shows_the_metrics_in_their_units(text):
    for section, panels in panels_of(text).items():
        for config in panels:
            names = config["metrics"] or [config["metricRegex"].strip("^/")]
            units = {METRICS[name.split("/")[0]].unit for name in names}
            assert len(units) == 1
            unit = units.pop()
            assert config["chartTitle"].endswith(f" [{unit}]") != (unit == "1"), config
            x = config["xAxis"]
            if section == "Quality against compute":
                assert x in ("tokens", "flops")
                assert config["xAxisTitle"] == f"{x} [{METRICS[x].unit}]"
            else:
                assert x == "_step"


def test_series_of_ranks_and_layers_are_found_by_their_pattern(text):
    patterns = {
        config["metricRegex"] for panels in panels_of(text).values() for config in panels if "metricRegex" in config
    }
    found = {name for name in METRICS if any(re.search(p, f"{name}/0") for p in patterns)}
    assert found == {name for name, metric in METRICS.items() if metric.axes and "expert" not in metric.axes}
    assert any(re.search(p, "rank_own_ms/max") for p in patterns)
    assert not any(re.search(p, "own_ms/0") or re.search(p, "step_ms") for p in patterns)
    maps = [config["metrics"] for config in panels_of(text)["Experts"] if HEAT_MAPS in str(config)]
    assert maps == [["expert_rows/0"], ["expert_rows/1"], ["expert_rows/2"]]


def test_the_specification_is_read_back_whole(text):
    def again(text):
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces.workspaces.internal import View

        return specification(ws.Workspace._from_model(View.model_validate_json(text)))

    assert again(text) == text
    other = text.replace("Learning rate", "Rate")
    assert again(other) == other != text


def test_it_is_written_and_nothing_is_sent(run, tmp_path, server, monkeypatch, text):
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    done = run("dashboard", "project=p", "entity=team", "layers=3", f"out={tmp_path / 'd.json'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d.json").read_text() == text
    done = run("dashboard", "project=p", "entity=team", "layers=3")
    assert done.stdout == text
    assert server.requests == []


BAD = {
    "no entity": (["apply=true"], ["entity", "TEAM"]),
    "layers": (["layers=-1"], ["layers=-1", "at least 0"]),
    "name": (["name='a+b'"], ["name='a+b'", "'+'"]),
    "empty": (["project=''"], ["project=''", "1 to 128 letters"]),
    "slash": (["project=a/b"], ["project='a/b'", "none of /"]),
    "folder": (["out=/does/not/exist/x.json"], ["/does/not/exist/x.json"]),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(run, options, words):
    done = run("dashboard", *options)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@dataclass
class Server:
    """A stand-in for W&B's server, with one project and its views."""

    port: int = 0
    refuses: bool = False
    views: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def environment(self, home):
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "a" * 40, "HOME": str(home)}

    def answer(self, query, variables):
        if "upsertView" in query:
            name = variables["name"]
            inserted = name not in self.views
            if not inserted:
                assert variables["id"] == self.views[name]["id"]
            self.views[name] = {"id": f"view-{name}", **variables}
            return {"upsertView": {"view": {"id": f"view-{name}", "name": name}, "inserted": inserted}}
        if "allViews" in query:
            if variables["projectName"] != "p":
                return {"project": None}
            found = [v for name, v in self.views.items() if name == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        return {"viewer": {"id": "me", "username": "me", "entity": "team", "flags": "{}"}}


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.requests.append(body["query"])
            answer = state.answer(body["query"], body.get("variables") or {})
            sent = json.dumps({"data": answer}).encode()
            self.send_response(401 if state.refuses else 200)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.port = http.server_port
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield state
        http.shutdown()


def apply(environment, *options, times=1):
    """Send the dashboard from a process of its own; W&B's client keeps its login for as long as a process lives."""
    program = (
        f"import sys\nfrom foreroute.launch.dashboard import main\nfor _ in range({times}):\n    try: main()\n   "
        " except SystemExit as end: code = end.code\nsys.exit(code)"
    )
    arguments = ["entity=team", "layers=3", "apply=true", *options]
    with Program(program, arguments, {**os.environ, **environment}) as process:
        return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), process.wait(), strict=True)))


def test_it_is_sent_once_and_then_changed(tmp_path, server, text):
    done = apply(server.environment(tmp_path), "project=p", times=2)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (view,) = server.views.values()
    sent, told = json.loads(view["spec"]), json.loads(text)
    assert sent == told["spec"]
    assert (view["name"], view["displayName"]) == (told["name"], told["displayName"])
    assert sum("upsertView" in query for query in server.requests) == 2
    url = f"http://127.0.0.1:{server.port}/team/p?nw={told['name'][3:-2]}"
    assert done.stdout.splitlines() == [f"sent: {url}"] * 2


def test_what_the_server_refuses_is_one_line(tmp_path, server):
    server.refuses = True
    done = apply(server.environment(tmp_path), "project=p")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "W&B: " in done.stderr and not server.views


def test_a_project_that_is_not_there_and_a_missing_key_are_one_line(tmp_path, server):
    done = apply(server.environment(tmp_path), "project=other")
    assert done.returncode == 2 and "project=other" in done.stderr and not server.views
    assert len(done.stderr.splitlines()) == 1, done.stderr
    done = apply({**server.environment(tmp_path), "WANDB_API_KEY": ""}, "project=p")
    assert done.returncode == 2 and "wandb login" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
