"""The process that renders chat templates, seen from outside: started, asked, bounded and ended. What it answers is
believed to be text and nothing more.
"""

import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any

import psutil

MAX_CPU_SECONDS = 2.0
"""For the renders of one request."""
MAX_SECONDS = 10.0
"""With the start of the process, on a machine that is busy with other things."""
MAX_RESIDENT_BYTES = 512 << 20
"""Where the process cannot bound its own memory."""
MAX_ANSWER_BYTES = 256 << 20
WATCH_SECONDS = 0.05
BOOTSTRAP = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
SANDBOX = Path(__file__).with_name("chat_sandbox.py")


class Sandbox:
    """Renders in a process that is started when it is first asked, and again when it had to be ended. Threads may share
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -I: neither the environment nor the working directory says what is imported; our own path does.
        command = [sys.executable, "-I", "-S", "-c", BOOTSTRAP, str(SANDBOX), *filter(None, sys.path)]
        # In a session of its own it does not hear Ctrl-C, which is for us.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        weakref.finalize(self, _end, process)
        self._process = process
        return process

    def ask(self, template: str, renders: list[dict[str, Any]]) -> list[str] | str:
        """The texts, one for each set of variables; or what went wrong: "says: …", by the template, or "failed: …".
        """
        request = {"template": template, "renders": renders, "seconds": MAX_CPU_SECONDS}
        with self._lock:
            process = self._started()
            with _Watch(process) as watch:
                try:
                    stdin, stdout = _pipes(process)
                    stdin.write(json.dumps(request).encode() + b"\n")
                    stdin.flush()
                    answer = json.loads(stdout.readline(MAX_ANSWER_BYTES))
                except (OSError, ValueError):
                    process.kill()
                    process.wait()
                    return watch.reason or _reason(process.returncode)
        return str(answer["error"]) if "error" in answer else [str(text) for text in answer["texts"]]


def _reason(returncode: int) -> str:
    if sys.platform != "win32" and returncode == -signal.SIGPROF:
        return f"failed: it took more than {MAX_CPU_SECONDS:g} s"
    return "failed: its process died"


class _Watch:
    """Ends a process that takes too long or too much memory for one answer, and says why."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.reason = ""
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if self.reason:
            self._process.wait()

    def _run(self) -> None:
        end = time.monotonic() + MAX_SECONDS
        while not self._done.wait(WATCH_SECONDS):
            if time.monotonic() > end:
                self.reason = f"failed: it took more than {MAX_SECONDS:g} s"
            elif _resident_bytes(self._process.pid) > MAX_RESIDENT_BYTES:
                self.reason = "failed: it needs too much memory"
            if self.reason:
                self._process.kill()
                return


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0  # it has just ended


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        try:
            pipe.close()
        except OSError:
            # What was still to be written to it has nowhere to go.
            continue
