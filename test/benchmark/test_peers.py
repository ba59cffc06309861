"""Servers side by side: what is started, stopped, measured and written, with our own server in the others' place."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmark.peers import install, models, readme, run
from benchmark.peers.servers import SERVERS, ServerError, Start, running
from simple_flashinfer.config import Config

TOUGH = """\
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def session(leader: int) -> list[int]:
    return [pid for pid in psutil.pids() if pid != os.getpid() and _session_of(pid) == leader]


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_a_model_has_a_text_for_each_token(envs):
    folder = str(envs / "models" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    assert len(tokenizer) == vocabulary == 8192
    assert all(tokenizer.decode([token]) for token in range(vocabulary))
    assert tokenizer.decode(tokenizer.encode("import os  # what else?")) == "import os  # what else?"
    assert "hello<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_a_vocabulary_is_filled_up_with_words_that_no_text_is_cut_into():
    tokenizer = models._tokenizer(9000)
    assert len(tokenizer) == 9000
    texts = [tokenizer.decode([token]) for token in range(9000)]
    assert all(texts)
    assert max(max(tokenizer.encode(text)) for text in texts[8192:]) < 8192


@pytest.mark.parametrize("name", SERVERS)
def test_commands(name, tmp_path):
    start = Start(tmp_path / "env", tmp_path / "model", port=4567, clients=64)
    command = SERVERS[name].command(start)
    assert all(isinstance(word, str) for word in command)
    assert command[command.index("--port") + 1] == "4567"
    assert {str(start.model), str(start.gguf)} & set(command)
    if name == "ours":
        flags = {word.removeprefix("--") for word in command if word.startswith("--")}
        assert flags <= set(Config.__dataclass_fields__)
    shown = SERVERS[name].shown_command()
    assert "MODEL" in shown
    assert "--port PORT" in shown
    assert str(Path.home()) not in shown.replace("ENV", "")
    assert sys.executable not in shown


def test_versions_are_pinned():
    for name in install.PEERS:
        assert install.versions(name), name
        lines = install._requirements(name).read_text().splitlines()[1:]
        assert all(line.count("==") == 1 for line in lines), name
    assert set(SERVERS) == {"ours", *install.PEERS}


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(envs):
    with pytest.raises(ServerError, match=r"vLLM is not in .*benchmark\.peers\.install"):
        SERVERS["vllm"].versions(envs)
    nowhere = replace(SERVERS["ours"], command=lambda start: ["/nowhere/server"])
    with pytest.raises(ServerError, match="can't be started"), running(nowhere, envs, envs, 1, envs / "log"):
        pass


def test_a_server_that_ends_at_once_shows_its_last_words(envs):
    broken = replace(SERVERS["ours"], command=lambda start: [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(ServerError, match="no such model"), running(broken, envs, envs, 1, envs / "log"):
        pass


def test_stopping_ends_all_children_even_unwilling_ones(envs, monkeypatch):
    monkeypatch.setattr("benchmark.peers.servers._STOP_SECONDS", 0.5)
    tough = replace(SERVERS["ours"], command=lambda start: [sys.executable, "-c", TOUGH, str(start.port)])
    with running(tough, envs, envs, 1, envs / "log") as server:
        leader = server.pid
        assert len(session(leader)) >= 3
    assert session(leader) == []


def test_sigterm_takes_the_server_along(tmp_path):
    program = f"""if True:
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        from benchmark.peers import servers
        servers._STOP_SECONDS = 0.5
        servers.stop_servers_when_terminated()
        tough = replace(servers.SERVERS["ours"], command=lambda start: [sys.executable, "-c", {TOUGH!r}, str(start.port)])
        with servers.running(tough, Path(), Path(), 1, Path({str(tmp_path / "log")!r})) as server:
            print(server.pid, flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=run.ROOT) as process:
        leader = int(process.stdout.readline())
        assert session(leader)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert session(leader) == []


async def test_one_server_is_measured_from_start_to_stop(envs, capsys):
    flags = ["--servers", "ours", "--shapes", "tiny", "--clients", "1", "--requests", "2", "--repeats", "1"]
    results = envs / "results.json"
    assert await run.run(run.arguments([*flags, "--envs", str(envs), "--save", str(results)]))
    saved = json.loads(results.read_text())
    (point,) = saved["points"]
    assert point["completed"] == 2
    assert point["prompt_tokens"] == 2 * 24
    assert point["output_tokens"] == 2 * 128
    assert not point["cached_tokens"]
    assert point["server_cpu_us_per_token"] > 0
    assert "| tiny: 24 + 128 | 1 | tokens/s | **" in capsys.readouterr().out


async def test_a_server_that_fails_is_a_point_too(envs, capsys, monkeypatch):
    failing = replace(SERVERS["ours"], command=lambda start: [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setitem(run.SERVERS, "ours", failing)
    monkeypatch.setattr(type(failing), "shown_command", lambda self: "python3 -c ...")
    flags = ["--servers", "ours", "--shapes", "tiny", "--repeats", "1", "--envs", str(envs)]
    assert not await run.run(run.arguments(flags))
    points = json.loads((envs / "peers.json").read_text())["points"]
    assert sorted(point["clients"] for point in points) == [1, 64]
    assert "| tiny: 24 + 128 | 1 | tokens/s | failed |" in capsys.readouterr().out


def test_only_a_whole_run_goes_into_the_readme():
    assert run.arguments([]).save == readme.RESULTS
    for flags in (["--servers", "ours"], ["--shapes", "tiny"], ["--clients", "1"], ["--requests", "8"]):
        assert run.arguments(flags).save != readme.RESULTS


@pytest.mark.parametrize("flags", [["--servers", "theirs"], ["--shapes", "huge"], ["--clients", "x"]])
def test_what_is_unknown_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        run.arguments(flags)
    assert flags[0] in capsys.readouterr().err


def _results() -> dict:
    def point(server, shape, clients, rate, ttft, cpu):
        times = {"ttft": {"p50": ttft}}
        about = {"server": server, "shape": shape, "clients": clients, "others_cpu": 0.01}
        return {**about, "output_throughput": rate, "times": times, "server_cpu_us_per_token": cpu}

    points = [
        point("ours", "tiny", 64, 5000.0, 100.0, 150.4),
        point("vllm", "tiny", 64, 4400.0, 90.0, 300.0),
        point("ours", "tiny", 64, 5500.0, 120.0, 150.4),
        point("vllm", "tiny", 64, 4400.0, 90.0, 300.0),
        point("ours", "smollm2-135m", 1, 40.0, 250.0, 9.0),
        {"server": "vllm", "shape": "smollm2-135m", "clients": 1, "error": "it did not start"},
    ]
    server = {"versions": {"torch": "2.13.0"}, "command": "serve MODEL", "extra_body": {}}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "machine": {"cpu": "A Processor", "cores": 2, "system": "Linux-6.1-x"},
        "memory_gib": 24,
        "repeats": 2,
        "plans": {shape: {"prompt_length": 24, "output_length": 128} for shape in ("tiny", "smollm2-135m")},
        "servers": {"ours": {**server, "title": "Ours"}, "vllm": {**server, "title": "vLLM", "extra_body": {"a": 1}}},
        "points": points,
    }


def test_the_table_of_the_readme(tmp_path):
    text = readme.section(_results())
    assert text.splitlines()[:7] == [
        "| model: tokens in + out | clients |  | Ours | vLLM |",
        "| --- | --: | --- | --: | --: |",
        "| tiny: 24 + 128 | 64 | tokens/s | **5,250** | 4,400 |",
        "|  |  | first token, ms | 110 | **90** |",
        "|  |  | server's CPU, µs a token | **150** | 300 |",
        "| smollm2-135m: 24 + 128 | 1 | tokens/s | **40** | failed |",
        "|  |  | first token, ms | **250** | failed |",
    ]
    for said in (
        "A Processor, 2 cores, 24 GiB",
        "2026-01-02, at abc1234",
        "each server had one turn",
        "vLLM (torch 2.13.0)",
        '{"a": 1}',
    ):
        assert said in " ".join(text.split())
    assert "doubtful" not in text
    twice = _results()
    twice["points"] *= 2
    assert "medians of 2 turns, tokens/s of one point differ by up to 9% between turns" in " ".join(
        readme.section(twice).split()
    )

    results, page = tmp_path / "results.json", tmp_path / "README.md"
    results.write_text(json.dumps(_results()))
    page.write_text("before\n<!-- peers -->\nold\nlines\n<!-- /peers -->\nafter\n")
    readme.write(results, page)
    assert page.read_text() == f"before\n<!-- peers -->\n{text}\n<!-- /peers -->\nafter\n"
    page.write_text("no such place\n")
    with pytest.raises(ValueError, match="peers"):
        readme.write(results, page)


def test_a_busy_machine_is_told():
    results = _results()
    results["points"][0]["others_cpu"] = 0.4
    assert "Other programs used up to 40% of it meanwhile" in " ".join(readme.section(results).split())


def test_the_readme_has_the_place_for_the_table():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert "<!-- peers -->\n" in text
    assert "<!-- /peers -->" in text


def test_health_is_what_is_waited_for(envs):
    with running(SERVERS["ours"], envs, envs / "models" / "tiny", 1, envs / "log") as server:
        with urlopen(f"{server.url}/health") as answer:
            assert answer.status == 200
        assert server.cpu_seconds() > 0
        leader = server.pid
    assert session(leader) == []
