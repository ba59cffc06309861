"""How long it takes from starting the daemon to the first token, and what the time goes to.

python3 -m simple_flashinfer.demo.cold_start [FLAGS OF THE DAEMON]
"""

import itertools
import json
import re
import subprocess
import sys
import time
import urllib.request

_QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "stream": True, "temperature": 0}


def main() -> None:
    start = time.perf_counter()
    marks = [("process start", 0.0)]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter() - start))

    flags = ["--host", "127.0.0.1", "--port", "0", *sys.argv[1:]]
    daemon = subprocess.Popen([sys.executable, "-m", "simple_flashinfer.main", *flags], stderr=subprocess.PIPE, text=True)
    assert daemon.stderr is not None
    try:
        for line in daemon.stderr:
            if found := re.search(r"Engine ready in [\d.]+ s \((.*)\)", line):
                mark(f"engine ready ({found[1]})")
            if found := re.search(r"Listening on (http://\S+)", line):
                mark("listening")
                break
        else:
            sys.exit("the daemon did not start")
        url = found[1] + "/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(_QUESTION).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    mark("first token")
                    break
    finally:
        daemon.terminate()
        daemon.wait()
    for (_, before), (name, after) in itertools.pairwise(marks):
        print(f"{after - before:6.2f} s  {name}")
    print(f"{marks[-1][1]:6.2f} s  in all")


if __name__ == "__main__":
    main()
