"""The server under load: how many tokens a second it gives so many clients, and how long each of them waits.

Starts a server (`serving_server.py`) and sends it clients from another process (`serving_client.py`). Every client
sends `--rounds` requests, one after the other, greedy, of prompts that nobody sent before. Flags after a `--` go to the
server: --device, --dtype, --quantize, --compile, --max-num-seqs … The last line on stdout is a JSON document.
"""

import argparse
import contextlib
import json
import platform
import signal
import statistics
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent
LEAST_REQUESTS = 3
"""However few clients there are."""
CROWD_TOKENS = (32, 16)
"""Prompt and answer of each of a crowd's requests."""
SHARED_TAIL = 16
"""Tokens of a prompt after those that it shares."""
SHARED_REQUESTS = 5


@dataclass
class Memory:
    """A process's memory while a `with` lasts, in bytes, about every tenth of a second."""

    pid: int
    samples: list[int] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Memory":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process(self.pid)
        while True:
            self.samples.append(process.memory_info().rss)
            if self._over.wait(0.1):
                return

    def growth(self) -> int:
        """From the greatest of its first half to the greatest of its second."""
        half = max(1, len(self.samples) // 2)
        return max(self.samples[half:], default=0) - max(self.samples[:half])


@dataclass(frozen=True)
class Server:
    process: "subprocess.Popen[str]"
    port: int
    facts: dict[str, Any]
    """What GET /v1/customization tells."""
    ready: dict[str, Any]
    """What its process said of itself before it served."""

    def clients(self, concurrency: int, requests: int, prompt: int, answer: int, *flags: str) -> dict[str, Any]:
        command = [
            sys.executable, str(HERE / "serving_client.py"), "--port", str(self.port), "--model", self.facts["model"],
            "--vocab", str(self.ready["vocab_size"]), "--concurrency", str(concurrency), "--requests", str(requests),
            "--prompt-tokens", str(prompt), "--max-tokens", str(answer), *flags,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if not done.stdout.strip():
            raise SystemExit(f"the clients ended with {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@contextlib.contextmanager
def server(args: argparse.Namespace, rest: list[str]) -> Iterator[Server]:
    """One that has told what its engine does alone, and serves."""
    command = [
        sys.executable, str(HERE / "serving_server.py"), args.model, *rest, "--port", "0", "--max-queue", "1024",
        "--prompt-tokens", str(args.prompt_tokens), "--max-tokens", str(args.max_tokens), "--alone", str(args.alone),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready, address = read_line(process), read_line(process)["address"]
            with urllib.request.urlopen(f"{address}v1/customization", timeout=60) as response:
                facts = json.load(response)
            yield Server(process, int(address.rstrip("/").rpartition(":")[2]), facts, ready)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def read_line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the server ended with {process.wait()}")
    document: dict[str, Any] = json.loads(line)
    return document


def rate(found: list[dict[str, float]], tokens: int) -> float:
    """Tokens a second of an engine alone, its prompt read within them."""
    return tokens / statistics.median(one["whole_s"] for one in found)


def measure_rows(running: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    show(f"{'clients':>7} {'tok/s':>8} {'':>6}  {'first token, ms':>17}  {'between, ms':>15}")
    show(f"{'':>7} {'':>8} {'':>6}  {'p50':>8} {'p99':>8}  {'p50':>7} {'p99':>7}")
    running.clients(1, 1, args.prompt_tokens, args.max_tokens, "--seed", "1000")  # for warmth
    for count in args.clients:
        requests = max(LEAST_REQUESTS, count * args.rounds)
        row = running.clients(count, requests, args.prompt_tokens, args.max_tokens, "--seed", str(count))
        rows.append(row)
        first, between = row["first_ms"], row["between_ms"]
        times = f"{row['tok_s'] / rows[0]['tok_s']:.2f}x"
        show(
            f"{count:>7} {row['tok_s']:>8.1f} {times:>6}  {first['p50']:>8.0f} {first['p99']:>8.0f}"
            f"  {between['p50']:>7.1f} {between['p99']:>7.1f}{'  FAILED' if row['failed'] else ''}"
        )
    return rows


def measure_crowd(running: Server, clients: int) -> dict[str, Any]:
    running.clients(64, 64, *CROWD_TOKENS, "--seed", "2000")  # what a first crowd makes a process take
    with Memory(running.process.pid) as memory:
        row = running.clients(clients, 2 * clients, *CROWD_TOKENS, "--seed", "2001")
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=60) as response:
        told = dict(line.split() for line in response.read().decode().splitlines() if not line.startswith("#"))
    row |= {"rss_bytes": memory.samples[-1], "rss_growth_bytes": memory.growth()}
    row |= {"left_running": float(told["torchchat_running"]), "left_waiting": float(told["torchchat_waiting"])}
    show(
        f"{clients} clients, {row['requests']} answers, {row['failed']} failed, the longest after "
        f"{row['longest_s']:.1f} s, {row['tok_s']:.0f} tok/s; memory grew by {row['rss_growth_bytes'] / 1e6:.1f} MB "
        f"in the second half; left: {row['left_running']:.0f} running, {row['left_waiting']:.0f} waiting"
    )
    return row


def measure_shared(running: Server, tokens: int) -> dict[str, Any]:
    """Time to first token of prompts that begin alike, beside that of prompts that do not."""
    whole = tokens + SHARED_TAIL
    apart = running.clients(1, SHARED_REQUESTS, whole, 2, "--seed", "3000")
    alike = running.clients(1, SHARED_REQUESTS, whole, 2, "--seed", "3001", "--shared-tokens", str(tokens))
    row = {"tokens": tokens, "prompt_tokens": whole, "apart": apart, "alike": alike}
    row["times"] = apart["first_ms"]["p50"] / alike["first_ms"]["p50"]
    show(
        f"first token of {whole} tokens: {apart['first_ms']['p50']:.1f} ms; when {tokens} of them were there: "
        f"{alike['first_ms']['p50']:.1f} ms, {row['times']:.1f}x"
    )
    return row


def show(line: str) -> None:
    print(line, flush=True)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is before the first `--` and what is after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,N,…")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--alone", type=int, default=3, help="runs of the engine alone, before and after (default: 3)")
    parser.add_argument("--crowd", type=int, default=0, metavar="N", help="and so many clients at once, twice")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="and prompts that share so many tokens")
    ours, rest = split(sys.argv[1:])
    args = parser.parse_args(ours)
    document: dict[str, Any] = {"prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens, "flags": rest}
    with server(args, rest) as running:
        show(f"{running.facts['model']} on {running.facts['device_name']}; ready in {running.ready['prepare_s']:.1f} s")
        document["rows"] = measure_rows(running, args) if args.clients else []
        document["crowd"] = measure_crowd(running, args.crowd) if args.crowd else None
        document["shared"] = measure_shared(running, args.shared) if args.shared else None
        running.process.send_signal(signal.SIGTERM)
        after = read_line(running.process)["alone"]
        code = running.process.wait()
    found = [*running.ready["alone"], *after]
    document["alone"] = {"tok_s": rate(found, args.max_tokens), "runs": found}
    if args.clients and args.clients[0] == 1:
        share = document["rows"][0]["tok_s"] / document["alone"]["tok_s"]
        document["one_client_of_alone"] = share
        show(f"the engine alone: {document['alone']['tok_s']:.1f} tok/s; one client gets {share:.1%} of that")
    document |= {"model": running.facts, "server_exit_code": code, "torch": torch.__version__}
    document |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    show(json.dumps(document))
    failed = [*document["rows"], *([document["crowd"]] if args.crowd else [])]
    return 1 if code or any(row["failed"] for row in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
