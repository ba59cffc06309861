from concurrent.futures import Future

import pytest

from simple_flashinfer.types import Abort, Add, EngineDeadError, FinishReason, Stop
from test.core.simulation import POISON, expected_output, make_engine, make_request, run

both = pytest.mark.parametrize("overlap", [False, True], ids=["one after the other", "overlap"])


@both
def test_one_failing_request_does_not_fail_its_neighbours(overlap):
    core = make_engine(overlap, max_num_seqs=8, num_pages=40)
    good = [make_request(str(i), [i + 1, i + 2], 6) for i in range(5)]
    bad = make_request("bad", [1, POISON], 6)
    finals = run(core, *good[:3], bad, *good[3:])
    assert finals["bad"][1] is FinishReason.ERROR
    assert "RuntimeError" in finals["bad"][2]
    for request in good:
        assert finals[request.request_id][:2] == expected_output(request)
    assert core.executor.batch_sizes[0] == 6
    assert core.executor.batch_sizes[-1] == 5, "back together, once the culprit is found"


@both
def test_a_passing_failure_costs_nobody_anything(monkeypatch, overlap):
    core = make_engine(overlap)
    execute, calls = core.executor.execute, []

    def fail_once(batch):
        calls.append(len(batch.rows))
        if len(calls) == 3:
            raise MemoryError
        return execute(batch)

    monkeypatch.setattr(core.executor, "execute", fail_once)
    requests = [make_request(name, [ord(name) % 50], 6) for name in "abc"]
    finals = run(core, *requests)
    assert {name: final[:2] for name, final in finals.items()} == {r.request_id: expected_output(r) for r in requests}
    assert calls[:7] == [3, 3, 3, 1, 1, 1, 3]


@both
def test_a_suspect_may_leave(overlap):
    core = make_engine(overlap)
    core.apply([Add(make_request("bad", [POISON])), Add(make_request("good", [1]))])
    for _ in range(1 + overlap):
        core.step()
    core.apply([Abort("bad")])
    finals = run(core)
    assert finals["bad"][1] is FinishReason.ABORT
    assert finals["good"][1] is FinishReason.LENGTH


def test_a_dead_device_ends_the_engine():
    core = make_engine()
    core.apply([Add(make_request("a", [1]))])
    dead: Future = Future()
    dead.set_exception(EngineDeadError("gone"))
    core.executor.execute = lambda batch: dead
    with pytest.raises(EngineDeadError):
        core.step()


def test_what_can_not_be_added_is_told():
    core = make_engine()
    finals = run(core, make_request("big", [1] * 30, 30), make_request("small", [1], 2))
    assert finals["big"][1] is FinishReason.ERROR
    assert "30 + 30" in finals["big"][2]
    assert finals["small"][1] is FinishReason.LENGTH


def test_nothing_to_do():
    core = make_engine()
    assert core.step() is None
    core.apply([Abort("never seen"), Stop()])
    assert core.step() is None
    assert core.stopped


def steps_in_flight(core, request):
    """How many there were after each was handed over."""
    execute, counts = core.executor.execute, []

    def watched(batch):
        running = execute(batch)
        counts.append(len(core.executor.queue))
        return running

    core.executor.execute = watched
    assert run(core, request)[request.request_id][:2] == expected_output(request)
    return counts


@both
def test_a_step_is_handed_over_before_the_one_before_is_done(overlap):
    assert max(steps_in_flight(make_engine(overlap), make_request("a", [1, 2], 8))) == 1 + overlap


@pytest.mark.parametrize(("stops", "wasted"), [(True, 1), (False, 0)])
def test_only_a_stop_token_wastes_a_step(stops, wasted):
    plain = make_request("a", [1, 2], 6)
    tokens, _ = expected_output(plain)
    request = make_request("a", [1, 2], 20, stop=[tokens[-1]]) if stops else plain
    expected = expected_output(request)
    core = make_engine(overlap=True)
    assert run(core, request)["a"][:2] == expected
    assert sum(core.executor.batch_sizes) == len(expected[0]) + wasted


def test_who_looks_back_is_never_ahead():
    assert max(steps_in_flight(make_engine(overlap=True), make_request("a", [1, 2], 8, looks_back=True))) == 1


def test_a_row_may_have_another_request_while_the_last_one_is_in_flight():
    core = make_engine(overlap=True, max_num_seqs=1, num_pages=30)
    requests = [make_request(str(i), [i + 1, 3], 20, stop=range(0, 50, 3)) for i in range(8)]
    finals = run(core, *requests)
    assert {name: final[:2] for name, final in finals.items()} == {r.request_id: expected_output(r) for r in requests}
