"""Ranges and what is made of them, against cases worked out by hand."""

import pytest
import torch

from foreroute.engine import tracing
from foreroute.engine.profiling.trace_events import Clock, Process, collective_events, torch_events
from foreroute.engine.profiling.trace_summary import costs, nest, overlap_ms, summary
from foreroute.engine.tracing import InFlight, Range, Recorder, record_into, span, traced

CLOCK = Clock(wall_ns=0, shift_ns=0, unsure_ns=0, origin_ns=0)


@pytest.fixture
def recorder():
    recorder = Recorder(annotate=False)
    record_into(recorder)
    yield recorder
    record_into(None)


def names(recorder):
    return [part.name for part in recorder.ranges]


def double(x, factor=2):
    with span("inside"):
        return x * factor


def test_ranges_are_recorded_only_while_a_recorder_is_set():
    recorder = Recorder(annotate=False)
    with span("before"):
        record_into(recorder)
        with span("while"):
            tracing.record_collective(1.0, 2.0)
        record_into(None)
    with span("after"):
        tracing.record_collective(3.0, 4.0)
    assert names(recorder) == ["while"]
    assert recorder.collectives == [InFlight("MainThread", 10**9, 2 * 10**9)]
    assert span("off") is span("off")  # nothing is made


def test_traced_is_the_function_itself_when_nothing_is_recorded():
    x = torch.ones(2, requires_grad=True)
    assert traced("double", double, x).grad_fn.name() == "MulBackward0"


def test_traced_gives_a_forward_and_a_backward_range(recorder):
    x, other = torch.ones(2, requires_grad=True), torch.ones(2)
    y = traced("double", torch.add, x.exp(), other)
    assert names(recorder) == ["double"]
    y.register_hook(lambda _: recorder.ranges.append(Range("gradient of y", "", 0, 0)))
    x.register_hook(lambda _: recorder.ranges.append(Range("gradient of x", "", 0, 0)))
    with span("backward"):
        y.sum().backward()
    assert names(recorder) == ["double", "gradient of y", "double", "gradient of x", "backward"]
    assert x.grad.equal(x.detach().exp())


def test_traced_waits_for_the_gradients_of_all_arguments(recorder):
    """The two gradients come at different times: that of b goes a longer way."""
    leaf = torch.ones(2, requires_grad=True)
    a, b = leaf * 2, leaf * 3

    def function(a, b):
        late = b.exp().log()
        late.register_hook(lambda _: recorder.ranges.append(Range("late", "", 0, 0)))
        return a + late

    traced("sum", function, a, b).sum().backward()
    assert names(recorder) == ["sum", "late", "sum"]
    assert leaf.grad.tolist() == [5, 5]


def test_traced_without_gradients_has_no_backward_range(recorder):
    x = torch.ones(2, requires_grad=True)
    assert traced("double", double, x.detach(), factor=3).tolist() == [3, 3]
    with torch.no_grad():
        traced("double", double, x)
    assert names(recorder) == ["inside", "double"] * 2


RANGES = [
    Range("dispatch", "MainThread", 2, 3),  # as they end, not as they begin
    Range("forward", "MainThread", 1, 5),
    Range("dispatch", "autograd's", 7, 9),
    Range("backward", "MainThread", 6, 10),
    Range("plan", "foreroute-planner", 0, 4),
    Range("step 1", "MainThread", 0, 12),
    Range("validation", "MainThread", 12, 20),
    Range("forward", "MainThread", 22, 25),
    Range("step 2", "MainThread", 21, 29),
]


def test_nesting_and_costs():
    nested = nest(RANGES)
    assert [(part.track, part.path, part.own_ns) for part in nested] == [
        ("main", "step 1/forward/dispatch", 1),
        ("main", "step 1/forward", 3),
        ("main", "step 1/backward/dispatch", 2),
        ("main", "step 1/backward", 2),
        ("planner", "plan", 4),
        ("main", "step 1", 4),
        ("main", "validation", 8),
        ("main", "step 2/forward", 3),
        ("main", "step 2", 5),
    ]
    expected = {  # per step; the validation is in none
        "step": [1, 10e-6, 4.5e-6],
        "forward": [1, 3.5e-6, 3e-6],
        "forward/dispatch": [0.5, 0.5e-6, 0.5e-6],
        "backward": [0.5, 2e-6, 1e-6],
        "backward/dispatch": [0.5, 1e-6, 1e-6],
        "plan (planner)": [0.5, 2e-6, 2e-6],
    }
    found = costs(nested)
    assert {key: pytest.approx(value) for key, value in expected.items()} == found
    own = [value[2] for key, value in found.items() if key != "plan (planner)"]
    assert sum(own) == pytest.approx(found["step"][1])


def test_the_summary_names_the_ten_most_expensive_ranges_and_the_slowest_rank():
    of_rank_0 = {"step": [1, 100, 1], **{f"range{i}": [2, 10 - i, 10 - i] for i in range(11)}}
    of_rank_1 = {**of_rank_0, "range3": [2, 50, 50]}
    ranks = [{"costs": of_rank_0, "overlap_ms": [2, 4]}, {"costs": of_rank_1, "overlap_ms": [0, 2]}]
    lines = summary("step 5", ranks).splitlines()
    assert lines[0].startswith("step 5: 100.0 ms a step")
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows[:2]] == ["range3", "range0"] and len(rows) == 10
    assert rows[0][1:] == ["2", "7.00", "7.00", "7.0%", "28.50", "50.00", "1"]
    assert "4.00 ms a step in flight, 3.00 ms (75%) of it hidden by computation" in lines[-1]
    alone = summary("step 5", [{"costs": of_rank_0, "overlap_ms": [0, 0]}])
    assert "ranks" not in alone and "exchange" not in alone and len(alone.splitlines()) == 12


def test_hidden_is_what_was_not_waited_for():
    ms = 10**6
    waits = nest([Range("exchange", "", 4 * ms, 6 * ms), Range("experts", "", 0, 4 * ms)])
    flights = [InFlight("", 1 * ms, 5 * ms), InFlight("", 2 * ms, 6 * ms)]
    assert overlap_ms(waits, flights) == (2, 3)  # under way from 1 to 6


def test_flights_that_overlap_get_tracks_of_their_own():
    flights = [InFlight("", 0, 4000), InFlight("", 1000, 2000), InFlight("", 2000, 6000), InFlight("", 4500, 5000)]
    places = ["step 1/forward/dispatch"] * 3 + ["step 1/forward/combine"]
    events = [e for e in collective_events(flights, places, Process(0, 1), CLOCK) if e["ph"] == "X"]
    first = events[0]["tid"]
    assert [(e["name"], e["tid"] - first, e["ts"], e["dur"]) for e in events] == [
        ("dispatch", 0, 0, 4),
        ("dispatch", 1, 1, 1),
        ("dispatch", 1, 2, 4),
        ("combine", 0, 4.5, 0.5),
    ]


def test_events_of_pytorch_become_the_ranks(monkeypatch):
    """As its profiler writes them on a GPU: the host's have the number of the process, the others that of the GPU."""
    monkeypatch.setattr("os.getpid", lambda: 77)
    trace = {
        "baseTimeNanoseconds": 5000,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 77, "tid": 0, "ts": 0, "args": {"name": "python"}},
            {
                "ph": "X",
                "cat": "Trace",
                "name": "PyTorch Profiler (0)",
                "pid": "Spans",
                "tid": "PyTorch Profiler",
                "ts": 1,
                "dur": 9,
            },
            {"ph": "X", "cat": "user_annotation", "name": "experts", "pid": 77, "tid": 77, "ts": 2, "dur": 1},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 77, "tid": 77, "ts": 2, "dur": 1},
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 4, "pid": 77, "tid": 77, "ts": 2},
            {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 3, "dur": 2},
            {"ph": "X", "cat": "gpu_user_annotation", "name": "experts", "pid": 0, "tid": 7, "ts": 3, "dur": 2},
        ],
    }
    clock = Clock(wall_ns=0, shift_ns=1000, unsure_ns=0, origin_ns=2000)
    events = torch_events(trace, Process(1, 2), clock, {"experts"})
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {(1, 77): "operators", (3, 7): "stream 7"}
    processes = [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"]
    assert processes == [(3, "rank 1 (GPU)")]
    assert [(e["name"], e["pid"], e["ts"], e.get("id")) for e in events if e["ph"] != "M"] == [
        ("aten::mm", 1, 6, None),
        ("ac2g", 1, 6, 9),
        ("gemm", 3, 7, None),
        ("experts", 3, 7, None),
    ]
