from concurrent.futures import Future

import pytest

from simple_flashinfer.types import Abort, Add, EngineDeadError, FinishReason, Stop
from test.core.simulation import POISON, expected_output, make_engine, make_request, run


def test_one_failing_request_does_not_fail_its_neighbours():
    core = make_engine(max_num_seqs=8, num_pages=40)
    good = [make_request(str(i), [i + 1, i + 2], 6) for i in range(5)]
    bad = make_request("bad", [1, POISON], 6)
    finals = run(core, *good[:3], bad, *good[3:])
    assert finals["bad"][1] is FinishReason.ERROR
    assert "RuntimeError" in finals["bad"][2]
    for request in good:
        assert finals[request.request_id][:2] == expected_output(request)
    assert core.executor.batch_sizes[0] == 6
    assert core.executor.batch_sizes[-1] == 5, "back together, once the culprit is found"


def test_a_passing_failure_costs_nobody_anything(monkeypatch):
    core = make_engine()
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


def test_a_suspect_may_leave():
    core = make_engine()
    core.apply([Add(make_request("bad", [POISON])), Add(make_request("good", [1]))])
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
