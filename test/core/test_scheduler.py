import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from simple_flashinfer.types import Abort, Add, FinishReason
from test.core.simulation import VOCABULARY, expected_output, make_engine, make_request, run


class EngineMachine(RuleBasedStateMachine):
    """Requests come, leave, are preempted and finish at random; every one that stays gets exactly its own tokens."""

    @initialize(
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 20),
        page_size=st.integers(1, 5),
        spare_pages=st.integers(0, 20),
        overlap=st.booleans(),
    )
    def start(self, max_num_seqs, budget, page_size, spare_pages, overlap):
        self.max_model_len = 24
        self.core = make_engine(
            overlap=overlap,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=self.max_model_len,
            page_size=page_size,
            num_pages=-(-self.max_model_len // page_size) + spare_pages,
        )
        self.requests, self.tokens, self.finals = {}, {}, {}

    @rule(
        prompt=st.one_of(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
            st.builds(
                lambda length, end: [*range(length), *end],
                st.integers(0, 17),
                st.lists(st.integers(0, 1), min_size=1, max_size=3),
            ),
        ),
        max_tokens=st.integers(1, 24),
        stop=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
        looks_back=st.sampled_from([False, False, False, True]),
    )
    def add(self, prompt, max_tokens, stop, looks_back):
        max_tokens = min(max_tokens, self.max_model_len - len(prompt))
        request = make_request(str(len(self.requests)), prompt, max_tokens, stop, looks_back)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        self.core.apply([Add(request)])

    @precondition(lambda self: len(self.requests) > len(self.finals))
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests.keys() - self.finals.keys())))
        self.core.apply([Abort(request_id)])
        assert self.step()[request_id] is FinishReason.ABORT

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.step()

    @rule()
    def fail(self):
        """One step, which does not happen for a single request: that one is to blame."""
        self.core.executor.fail_soon = self.core.scheduler.stats().num_running > 1

    def step(self):
        reasons = {}
        result = self.core.step()
        for output in result.outputs if result else ():
            assert output.request_id not in self.finals, "nothing comes after the last output"
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                reasons[output.request_id] = self.finals[output.request_id] = output.finish_reason
        self.core.scheduler.check()
        return reasons

    @invariant()
    def everyone_has_a_beginning_of_their_own_tokens(self):
        for request_id, request in getattr(self, "requests", {}).items():
            tokens, reason = expected_output(request)
            if self.finals.get(request_id) in (FinishReason.STOP, FinishReason.LENGTH):
                assert (self.tokens[request_id], self.finals[request_id]) == (tokens, reason)
            else:
                assert self.tokens[request_id] == tokens[: len(self.tokens[request_id])]

    def teardown(self):
        if hasattr(self, "core"):
            for _ in range(10_000):
                if not self.core.has_work:
                    break
                self.step()
            assert self.finals.keys() == self.requests.keys(), "every request ends"
            self.everyone_has_a_beginning_of_their_own_tokens()
            assert self.core.scheduler.kv.pool.num_free == self.core.scheduler.kv.pool.num_pages


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_one_request_after_the_other_comes_in_order():
    core = make_engine(max_num_seqs=1)
    order = list(run(core, *(make_request(str(i), [i + 1], 3) for i in range(5))))
    assert order == ["0", "1", "2", "3", "4"]


def test_more_requests_than_rows():
    core = make_engine(max_num_seqs=128, num_pages=400, max_num_batched_tokens=512)
    requests = [make_request(str(i), [1 + i % 40, i % 7], 6) for i in range(129)]
    finals = run(core, *requests)
    assert {request_id: final[:2] for request_id, final in finals.items()} == {
        request.request_id: expected_output(request) for request in requests
    }


def test_a_long_prompt_does_not_stop_running_requests():
    core = make_engine(max_num_batched_tokens=8, max_model_len=100, num_pages=60)
    core.apply([Add(make_request("decoding", [1, 2], 30))])
    core.step()
    core.apply([Add(make_request("long", range(1, 41), 2))])
    for _ in range(5):
        assert [output.request_id for output in core.step().outputs] == ["decoding"], "a token in every step"


def test_preempted_requests_go_on_before_newer_ones():
    core = make_engine(num_pages=6, max_model_len=24, max_num_seqs=3)
    finals = run(core, *(make_request(str(i), [i + 1] * 4, 16) for i in range(4)))
    assert list(finals) == ["0", "1", "2", "3"]
    assert core.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
def test_pages_at_exact_multiples(length):
    core = make_engine()
    core.apply([Add(make_request("a", range(1, length + 1), 4))])
    core.step()
    assert core.scheduler.stats().num_free_pages == 12 - -(-length // 4)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "limit"), [(range(1, 41), 1, "40"), ([1], 40, "40"), ([1] * 30, 20, "40"), ([], 3, "at least")]
)
def test_what_can_never_fit_is_refused(prompt, max_tokens, limit):
    core = make_engine()
    with pytest.raises(ValueError, match=limit):
        core.scheduler.add(make_request("a", list(prompt), max_tokens))
    assert not core.has_work


def test_what_just_fits_is_served():
    core = make_engine(num_pages=5, max_model_len=21)  # 20 tokens in pages, and a last one that needs none
    request = make_request("a", range(1, 11), 11)
    assert run(core, request)["a"][:2] == expected_output(request)
    with pytest.raises(ValueError, match="21"):
        core.scheduler.add(make_request("b", range(1, 11), 12))


def test_many_stop_tokens():
    core = make_engine()
    stop = range(VOCABULARY)
    finals = run(core, make_request("few", [1, 2], 5), make_request("all", [1, 2], 5, stop), make_request("b", [3], 5))
    assert finals["all"][1] is FinishReason.STOP
    assert len(finals["all"][0]) == 1
    assert finals["few"][1] is finals["b"][1] is FinishReason.LENGTH


def test_a_request_id_is_used_once():
    core = make_engine()
    core.scheduler.add(make_request("a", [1]))
    with pytest.raises(ValueError, match="in use"):
        core.scheduler.add(make_request("a", [2]))


def test_check_sees_a_page_with_two_owners():
    core = make_engine()
    core.apply([Add(make_request(name, [1, 2, 3])) for name in "ab"])
    core.step()
    table = core.scheduler.table
    table.page_table[1, 0] = table.page_table[0, 0]
    with pytest.raises(AssertionError, match="taken, but by no running request"):
        core.scheduler.check()


def cached_tokens(core, *requests):
    core.apply([Add(request) for request in requests])
    found = {}
    while core.has_work:
        for output in core.step().outputs:
            if output.num_cached_tokens is not None:
                assert output.request_id not in found, "told once, with the first token"
                found[output.request_id] = output.num_cached_tokens
        core.scheduler.check()
    return found


def test_a_request_that_begins_like_an_earlier_one_shares_its_pages():
    core = make_engine(num_pages=30)
    prompt = list(range(1, 15))  # 3 full pages and 2 tokens
    assert cached_tokens(core, make_request("first", prompt, 6)) == {"first": 0}
    again = make_request("again", prompt, 6)
    longer = make_request("longer", [*prompt, 7, 7], 6)
    other = make_request("other", [9, *prompt[1:]], 6)
    steps = core.scheduler.stats().num_steps
    assert cached_tokens(core, again, longer, other) == {"again": 12, "longer": 12, "other": 0}
    assert core.scheduler.stats().num_steps - steps < 10
    assert core.scheduler.stats().num_free_pages == 30
    finals = run(core, make_request("x", prompt, 6), make_request("y", [*prompt, 7, 7], 6))
    assert finals["x"][0] == expected_output(again)[0]
    assert finals["y"][0] == expected_output(longer)[0]


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_of_a_prompt_is_always_computed(length, cached):
    core = make_engine()
    prompt = list(range(1, length + 1))
    cached_tokens(core, make_request("a", prompt, 1))
    assert cached_tokens(core, make_request("b", prompt, 1)) == {"b": cached}


def test_the_next_turn_finds_the_answer_before():
    core = make_engine(max_model_len=100, num_pages=40)
    first = make_request("first", [1, 2, 3, 4, 5], 12)
    answer = run(core, first)["first"][0]
    turn = make_request("turn", [1, 2, 3, 4, 5, *answer, 9, 9], 3)
    assert cached_tokens(core, turn) == {"turn": (5 + 12 - 1) // 4 * 4}


def test_without_prefix_caching_nothing_is_found():
    core = make_engine(prefix_caching=False)
    requests = [make_request(name, range(1, 15), 2) for name in "ab"]
    assert [cached_tokens(core, request) for request in requests] == [{"a": 0}, {"b": 0}]


def test_cached_pages_are_given_up_for_a_request_that_needs_them():
    core = make_engine(num_pages=10)
    for i in range(20):
        request = make_request(str(i), [i, *range(1, 30)], 6)
        assert run(core, request)[str(i)][0] == expected_output(request)[0]


def test_the_queue_does_not_slow_a_step_down():
    core = make_engine()
    core.apply([Add(make_request(str(i), [1, 2, 3])) for i in range(20_000)])
    core.step()
    for request_id in range(19_999, 4, -1):  # leaving from the end of a long queue costs nothing either
        assert core.scheduler.abort(str(request_id))
    core.scheduler.check()
    assert core.scheduler.stats().num_running + core.scheduler.stats().num_waiting == 5
