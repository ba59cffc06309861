"""The load generator against the real daemon, and against a server that does wrong."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmark import report
from benchmark.cli import main, parser
from benchmark.client import Exchange
from benchmark.load import Load, run_point
from benchmark.metrics import Record, distribution, summarize
from benchmark.target import Target, TargetError
from benchmark.workload import Workload, arrival_times, conversations
from test.benchmark.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


async def point(url, workload, load, endpoint="chat", **more):
    target = await Target.connect("server", url, endpoint=endpoint)
    try:
        return await run_point(target, await conversations(workload, target.count), load, **more)
    finally:
        target.client.close()


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_lengths_are_exact(daemon, endpoint):
    workload = Workload(prompt_length=75, output_length=9, seed=1)
    result = await point(daemon.url, workload, Load(concurrency=4, conversations=12, warmup=2), endpoint)
    assert (result.completed, result.failed, result.short, result.invalid, result.errors) == (12, 0, 0, [], [])
    assert {record.exchange.reply.prompt_tokens for record in result.records} == {75}
    assert {record.exchange.reply.output_tokens for record in result.records} == {9}
    assert (result.prompt_tokens, result.output_tokens) == (12 * 75, 12 * 9)
    assert result.cached_tokens == 0
    assert result.times["ttft"]["p50"] < result.times["e2e"]["p50"]
    assert result.output_throughput == pytest.approx(12 * 9 / result.duration)


async def test_an_open_loop_sends_at_its_own_times(daemon):
    workload = Workload(prompt_length=40, output_length=4, seed=2)
    result = await point(daemon.url, workload, Load(rps=100, conversations=10, seed=5), max_lag=1e9)
    assert (result.completed, result.failed, result.invalid) == (10, 0, [])
    expected = list(itertools.islice(arrival_times(100, "poisson", 1, 5), 10))
    starts = sorted(record.exchange.started - record.late for record in result.records)
    assert np.diff(starts) == pytest.approx(np.diff(expected), abs=1e-6)
    assert result.late["p50"] >= 0


async def test_a_duration_ends_a_point():
    with FakeServer() as server:
        began = time.perf_counter()
        result = await point(server.url, Workload(output_length=4), Load(concurrency=2, duration=0.2))
        assert 0.2 <= time.perf_counter() - began < 10
    assert result.completed > 2


async def test_a_shared_prefix_is_cached_and_nothing_else(daemon):
    workload = Workload(prompt_length=200, output_length=2, shared_prefix=0.5, seed=3)
    result = await point(daemon.url, workload, Load(concurrency=1, conversations=5, warmup=1))
    assert result.invalid == []
    assert 5 * 80 <= result.cached_tokens <= 5 * 100


async def test_prompts_differ_from_their_second_word_on():
    with FakeServer() as server:
        target = await Target.connect("server", server.url)
        again = [await conversations(Workload(seed=4), target.count) for _ in range(2)]
        target.client.close()
    texts, same = ([turn.text for (turn,) in itertools.islice(source, 2000)] for source in again)
    assert texts == same
    assert len({tuple(text.split()[:4]) for text in texts}) == 2000
    assert all(a.split()[1] != b.split()[1] for a, b in itertools.pairwise(texts))


async def test_a_conversation_takes_the_answers_along():
    with FakeServer() as server:
        result = await point(server.url, Workload(30, 3, turns=3), Load(concurrency=1, conversations=1))
        last = server.requests[-1]["messages"]
    assert (result.completed, result.invalid) == (3, [])
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == last[3]["content"] == " w0 w1 w2"
    assert len({last[i]["content"] for i in (0, 2, 4)}) == 3
    assert [len(last[i]["content"].split()) for i in (0, 2, 4)] == [25] * 3


async def test_a_start_token_is_repeated():
    with FakeServer() as server:
        load = Load(concurrency=1, conversations=2)
        alone = await point(server.url, Workload(None, 2, "Hello ", 20), load)
        text = server.requests[-1]["messages"][0]["content"]
        filled = await point(server.url, Workload(40, 2, "Hello ", 20), load)
        longer = server.requests[-1]["messages"][0]["content"]
    assert (alone.invalid, filled.invalid) == ([], [])
    assert text == "Hello " * 20
    assert longer.startswith(text)
    assert (alone.prompt_tokens, filled.prompt_tokens) == (2 * 25, 2 * 40)


async def test_recorded_conversations(tmp_path):
    file = tmp_path / "sharegpt.json"
    talks = [[f"question {i} " * 4, "an answer of six whole words"] for i in range(3)] + [
        ["long " * 5000, "x"],
        ["no answer"],
    ]
    turns = [[{"from": kind, "value": text} for kind, text in zip(("human", "gpt"), talk, strict=False)] for talk in talks]
    file.write_text(json.dumps([{"conversations": talk} for talk in turns]))
    with FakeServer() as server:
        result = await point(server.url, Workload(sharegpt=str(file)), Load(concurrency=1, conversations=4))
        asked = server.requests[-4:]
    assert {request["messages"][0]["content"] for request in asked} == {talk[0] for talk in talks[:3]}
    assert {request["max_tokens"] for request in asked} == {6}
    assert result.warnings == ["1 prompts were sent before: the file has too few conversations"]


def run(*arguments, capsys):
    status = main([*arguments, "--requests_per_client", "2", "--warmup", "0", "--output_length", "4"])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"prompt_lie": 1}, "257 prompt tokens by the server's usage, 256 were asked for"),
        ({"extra_chunks": 2}, "6 chunks of text, but 4 output tokens by usage"),
    ],
)
def test_a_count_that_differs_fails_the_run(wrong, complaint, capsys):
    with FakeServer(**wrong) as server:
        flags = ("--url", server.url, "--concurrency_list", "2", "--allow_failures")
        status, (out, err) = run(*flags, capsys=capsys)
    assert status == 1
    assert re.search(rf"request \d: {complaint}", err)
    assert "invalid" in out


def test_a_server_without_usage_is_refused(capsys):
    with FakeServer(usage=False) as server:
        status, (_, err) = run("--url", server.url, capsys=capsys)
    assert status == 1
    assert "no usage" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"status": 500}, "HTTP 500: .*out of order"), ({"broken": True}, "error in the stream: .*the engine is dead")],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_failures_are_counted_and_shown(wrong, message, allowed, capsys):
    with FakeServer(**wrong) as server:
        flags = ["--url", server.url, "--concurrency_list", "2", *["--allow_failures"][:allowed]]
        status, (out, err) = run(*flags, capsys=capsys)
    assert status == (0 if allowed else 1)
    assert re.search(message, err)
    assert re.search(r"concurrency 2 \| server \| +0 \| +4 \|", out)


def test_nobody_listens(capsys):
    status, (_, err) = run("--url", "http://127.0.0.1:9", capsys=capsys)
    assert status == 1
    assert "can't reach http://127.0.0.1:9" in err


def test_short_answers_are_no_secret(capsys):
    with FakeServer(short=1, refused=("min_tokens", "ignore_eos")) as server:
        status, (out, err) = run("--url", server.url, "--concurrency_list", "2", capsys=capsys)
        assert "ignore_eos" not in server.requests[-1]
    assert status == 0
    assert "4 of 4 answers were shorter than asked for" in err
    assert "short answers" in out


async def test_a_client_that_is_too_slow_says_so():
    async def hog():
        while True:
            time.sleep(0.05)  # noqa: ASYNC251 (the fault that is to be noticed)
            await asyncio.sleep(0.001)

    load = Load(concurrency=2, conversations=8)
    with FakeServer(chunked=False) as server:  # also answers that end with their connection
        fine = await point(server.url, Workload(output_length=16), load, max_lag=1e9)
        hogging = asyncio.create_task(hog())
        slow = await point(server.url, Workload(output_length=16), load, max_lag=20)
        late = await point(server.url, Workload(output_length=2), Load(rps=200, conversations=8), max_lag=20)
        hogging.cancel()
    assert (fine.completed, fine.lagging) == (8, False)
    assert slow.lagging
    assert "event loop was" in slow.warnings[0]
    assert any("requests were" in warning for warning in late.warnings)


def exchange(parts, started=0.0):
    return Exchange(started, 200, [(when, part.encode()) for when, part in parts])


def chunk(text, finish=None):
    return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}]}) + "\n\n"


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'


def test_definitions():
    parts = [
        (0.1, chunk("")),
        (0.5, chunk("a")),
        (0.7, chunk("b")[:9]),
        (0.8, chunk("b")[9:] + chunk("c")),
        (1.1, chunk("d", "stop")),
    ]
    record = Record(0, exchange([*parts, (1.4, USAGE)]), 4, 7)
    assert record.complaint() is None
    assert record.exchange.reply.text == "abcd"
    assert record.times() == pytest.approx({"ttft": 500, "e2e": 1100, "tpot": 200})
    assert record.gaps() == pytest.approx([300, 0, 300])
    other = Record(1, exchange([(2.0, chunk("abcd", "stop")), (2.0, USAGE)], started=1.0), 4, 7)
    result = summarize([record, other], {"ttft": 600, "tpot": 200.5})
    assert result.duration == 2
    assert (result.request_throughput, result.output_throughput, result.total_throughput) == (1, 4, 11)
    assert result.goodput == 0.5
    assert result.times["ttft"]["mean"] == pytest.approx(750)


def test_percentiles_are_those_of_numpy():
    values = np.random.default_rng(0).exponential(size=137)
    expected = {f"p{p}": np.quantile(values, p / 100) for p in (50, 90, 99)}
    assert distribution(values) == pytest.approx({"mean": values.sum() / 137, "max": max(values), **expected})
    assert distribution([]) is None
    assert distribution([3, 1, 2, 4])["p50"] == 2.5


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([(1, chunk("a"))], "ended without a finish_reason"),
        ([(1, "data: {nonsense\n\n")], "no JSON"),
        ([(1, 'error: {"message": "no"}\n\n')], "error in the stream"),
    ],
)
def test_streams_that_break_off(parts, error):
    assert error in exchange(parts).reply.error


@pytest.mark.parametrize(("kind", "burstiness", "deviation"), [("poisson", 9, 1), ("gamma", 0.25, 2), ("gamma", 4, 0.5)])
def test_arrivals(kind, burstiness, deviation):
    gaps = np.diff(list(itertools.islice(arrival_times(4, kind, burstiness, 0), 20_000)))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(deviation, rel=0.05)


def test_a_comparison_with_files_and_pictures(daemon, tmp_path):
    files, pictures = tmp_path / "files", tmp_path / "pictures"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--compare", f"a={daemon.url}", "--compare", f"b={daemon.url}/v1"]
    command += ["--concurrency_list", "1,4", "--repeats", "2", "--requests_per_client", "1", "--prompt_length", "64"]
    command += ["--output_length", "6", "--slo", "ttft:10000,tpot:10000", "--save", str(files), "--save_requests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"concurrency [14] \| b .*x\)", done.stdout)) == 2
    data = json.loads((files / "b-concurrency_4-1.json").read_bytes())
    assert {"date", "command", "machine", "server", "load", "workload", "repeat", "result"} <= data.keys()
    assert data["server"]["version"]
    assert len(data["result"]["requests"]) == 4
    assert all(len(request["itl"]) >= 1 for request in data["result"]["requests"])
    points = report.read(files)
    assert len(points) == 2 * 2 * 2
    assert main(["--from", str(files), "--plot", str(pictures)]) == 0
    assert report.table(points) in done.stdout
    for name in ("latency.png", "throughput.png"):
        assert (pictures / name).read_bytes().startswith(b"\x89PNG")


def test_the_readme_names_flags_that_are_there():
    section = (ROOT / "README.md").read_text().partition("## Measure it")[2].partition("<!-- peers -->")[0]
    section = re.sub(r'ARGS="[^"]*"|`python3 -m [^`]*`', "", section)  # those have flags of their own
    named = set(re.findall(r"--[a-z_]+", section))
    assert named
    assert named <= {flag for action in parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize(
    "flags", [["--slo", "speed:1"], ["--concurrency_list", "0"], ["--compare", "url"], ["--shared_prefix", "2"]]
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2
    assert flags[0] in capsys.readouterr().err


async def test_a_prompt_shorter_than_the_template():
    with FakeServer() as server, pytest.raises(TargetError, match=r"--prompt_length 5: .* alone are 6 tokens"):
        await point(server.url, Workload(prompt_length=5), Load(concurrency=1, conversations=1))
