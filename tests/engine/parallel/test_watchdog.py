"""A lost, failing or late rank is named: two watches of one process on a store in memory."""

import queue
import threading
import time
from types import SimpleNamespace

import pytest
from torch import distributed as dist

from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.parallel import watchdog as watching
from foreroute.engine.parallel.watchdog import Watchdog
from foreroute.launch.testing.runs import wait_until


@pytest.fixture
def store():
    return dist.HashStore()


def watch(store, rank, ranks=2, timeout_s=2.0):
    lines = queue.Queue()
    return Watchdog(store, rank, ranks, timeout_s, end=lines.put), lines


def test_a_rank_without_a_sign_of_life_is_named(store):
    lost, _ = watch(store, 1)
    store.set("alive/1", "7 step 12")
    lost._closed.set()  # its thread ends without a word, as with its process
    _, lines = watch(store, 0)
    assert lines.get(timeout=20) == "rank 1 is lost: no sign of life for 1 s, last seen at step 12"


def test_a_rank_that_came_to_its_end_is_not_missed(store):
    done, _ = watch(store, 1)
    done.close()
    other, lines = watch(store, 0)
    with pytest.raises(queue.Empty):
        lines.get(timeout=3)
    other.close()


def test_nothing_is_left_of_a_closed_watch(store):
    """Its thread must not be in the store when the interpreter ends, nor take back that its rank has come to its
    end."""
    for _ in range(20):
        closed, _ = watch(store, 0, timeout_s=1e-3)
        closed.close()
        assert not closed._thread.is_alive() and store.get("alive/0") == b"done"


def test_a_failure_is_told_to_all(store):
    watches = [watch(store, rank, ranks=3) for rank in range(3)]
    with pytest.raises(KeyError), watches[1][0].guard():
        raise KeyError("the missing shard")
    for rank in (0, 2):
        assert watches[rank][1].get(timeout=20) == "rank 1 ended: KeyError 'the missing shard'"
    assert watches[1][1].empty()  # it ends by itself, with its traceback


def test_what_all_ranks_raise_is_not_reported(store):
    error = UserError("wrong everywhere")
    error.everywhere = True
    both = [watch(store, rank) for rank in range(2)]
    with pytest.raises(UserError), both[1][0].guard():
        raise error
    assert not store.check(["fault"])
    for one, _ in both:
        one.close()


def test_a_broken_connection_is_blamed_on_the_rank_that_is_gone(store):
    lost, _ = watch(store, 1)
    lost.at("step 3")
    lost._closed.set()
    store.set("alive/1", "7 step 3")
    other, lines = watch(store, 0, timeout_s=8.0)
    with pytest.raises(RunFailed, match="rank 1 is lost: no sign of life, last seen at step 3"), other.guard():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    other.close()
    assert lines.empty()


def test_a_rank_that_stays_behind_is_named(store):
    late, lines = watch(store, 1)
    late.at("step 11")
    waiting, _ = watch(store, 0)
    waiting.at("step 12")
    with pytest.raises(RunFailed, match=r"rank 1 is at step 11, rank 0 at step 12: .*Timed out"), waiting.guard():
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms\nmore")
    assert lines.get(timeout=20).startswith("rank 1 is at step 11, rank 0 at step 12: ")  # its end
    for one in (late, waiting):
        one.close()


def test_no_progress_ends_all_and_names_who_is_behind(store):
    """All threads are alive and the main threads wait for each other, as in a collective that nobody else enters."""
    ranks = [watch(store, rank, ranks=3) for rank in range(3)]
    for rank, (one, _) in enumerate(ranks):
        one.at("step 2" if rank == 1 else "step 3", timeouts=1)
    for _, lines in ranks:
        line = lines.get(timeout=20)
        assert line == "no progress for 2 s: rank 1 is at step 2, the other 2 are at step 3"


def test_what_may_take_long_is_not_timed(store):
    both = [watch(store, rank, timeout_s=1.0) for rank in range(2)]
    for one, _ in both:
        one.at("step 3", timeouts=1)
        one.at("the checkpoint of step 4")
    for one, lines in both:
        with pytest.raises(queue.Empty):
            lines.get(timeout=2)
        one.close()


class Sleepers:
    """A clock of all watches that jumps, as when a job is suspended as a whole."""

    def __init__(self, monkeypatch):
        self.slept_s = 0.0
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + self.slept_s, sleep=time.sleep)
        monkeypatch.setattr(watching, "time", clock)


def jump_in(ask, sleepers):
    """Let the clock jump once inside a call."""
    jumps = iter([1000.0])

    def jumped(use):
        sleepers.slept_s += next(jumps, 0.0)
        return ask(use)

    return jumped


def test_a_job_that_was_suspended_goes_on(store, monkeypatch):
    """Nobody is lost behind a gap in one's own clock, nor is anybody's time over; who stays silent is lost
    afterwards."""
    sleepers = Sleepers(monkeypatch)
    both = [watch(store, rank) for rank in range(2)]
    for one, _ in both:
        one.at("step 3", timeouts=5)
    wait_until(lambda: all(store.check([f"alive/{rank}"]) for rank in range(2)))
    for one, _ in both:  # it may fall into a call to the store, too
        one._store.ask = jump_in(one._store.ask, sleepers)
    for _ in range(3):
        time.sleep(0.5)
        sleepers.slept_s += 1000.0
    time.sleep(1.5)
    assert sleepers.slept_s == 5000.0
    assert not store.check(["fault"]) and all(lines.empty() for _, lines in both)
    both[1][0]._closed.set()
    assert both[0][1].get(timeout=20).startswith("rank 1 is lost: no sign of life for 1 s")
    both[0][0].close()


def test_who_gets_on_is_given_time_again(store):
    one, lines = watch(store, 0, timeout_s=1.0)
    other, _ = watch(store, 1, timeout_s=1.0)
    one.at("the evaluation")
    for _ in range(10):
        one.gets_on()
        time.sleep(0.2)
    assert lines.empty()
    assert lines.get(timeout=20) == "no progress for 1 s: rank 0 is at the evaluation, rank 1 is at the start"
    for each in (one, other):
        each.close()


def test_a_rank_that_reported_keeps_its_own_reason(store):
    """Its connections break because the others end; by then the store may be gone."""
    first, _ = watch(store, 0)
    first.report("another version is installed")
    with pytest.raises(RunFailed, match=r"^another version is installed$"), first.guard():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    first.close()


def test_a_rank_that_ended_is_not_at_the_start(store):
    ended, _ = watch(store, 1)
    ended.close()
    waiting, _ = watch(store, 0)
    waiting.at("step 12")
    with pytest.raises(RunFailed, match="rank 1 is at its end, rank 0 at step 12"), waiting.guard():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    waiting.close()


def test_a_bug_keeps_its_type(store):
    other, _ = watch(store, 0)
    with pytest.raises(RuntimeError, match="shape"), other.guard():
        raise RuntimeError("shape '[2, 3]' is invalid")
    other.close()


def test_a_lost_store_is_rank_0s(store):
    class Gone:
        def check(self, *arguments):
            raise dist.DistNetworkError("Connection reset by peer")

        set = get = compare_set = check

    _, lines = watch(Gone(), 1)
    assert lines.get(timeout=20) == "rank 0 is lost: its store does not answer"


def test_a_store_that_does_not_answer_is_rank_0s():
    """As behind a cut network. Neither the watching thread nor the main thread, whose collective gave up, waits for
    ever."""
    answered = threading.Event()

    class Silent:
        def check(self, *arguments):
            answered.wait()

        set = get = compare_set = check

    one, lines = watch(Silent(), 1)
    with pytest.raises(RunFailed, match="rank 0 is lost: its store does not answer"), one.guard():
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms")
    one.close()
    assert lines.empty()  # the main thread ends by itself
    _, lines = watch(Silent(), 1)
    assert lines.get(timeout=20) == "rank 0 is lost: its store does not answer"
    answered.set()
