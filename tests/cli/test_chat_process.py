"""The program itself, as a person starts it in a terminal: the built-in model, a real Ctrl-C, a real Ctrl-D."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")
ROOT = Path(__file__).parent.parent.parent
PROMPT = re.compile(r"> .*a message, or /help")
CSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


@pytest.mark.slow  # a process that imports torch and loads the built-in model three times
def test_a_conversation_with_the_built_in_model(tmp_path):
    environ = os.environ | {"TORCHCHAT_CACHE_DIR": str(tmp_path / "cache"), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody answers here when the program asks where the cursor is
    environ.pop("NO_COLOR", None)
    argv = [str(ROOT / "torchchat.py"), "chat", "--device", "cpu", "--dtype", "bf16", "--stats"]
    child = pexpect.spawn(sys.executable, argv, env=environ, encoding="utf-8", timeout=360, dimensions=(30, 120))
    child.expect(PROMPT)
    child.send("Hello!\r")
    child.expect(r"context \d+ of 1,024")
    child.expect(PROMPT)
    child.send("/quantize cpu\r")
    child.expect("quantized: ")
    child.expect(PROMPT)
    child.send("/dtype fp32\r")
    child.expect(r"fp32 \(--dtype\)")
    child.expect(PROMPT)
    child.send("Tell me a long story.\r")
    child.expect("…")  # the answer has begun
    time.sleep(0.3)
    child.sendintr()
    child.expect([r"\(stopped\)", r"context \d+ of"])  # a short answer may be whole by then
    child.expect(PROMPT)
    child.send("/show\r")
    child.expect("messages +4")
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in child.before


@pytest.mark.slow  # a process that imports torch
def test_a_program_that_feeds_messages_gets_each_answer_when_it_is_made(tmp_path):
    environ = os.environ | {"TORCHCHAT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(ROOT / "torchchat.py"), "chat", "--device", "cpu", "--max-new-tokens", "8"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, env=environ, text=True, **pipes) as process:
        for message in ("Hello!", "How are you?"):
            process.stdin.write(message + "\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait(timeout=240) == 0


def test_help_imports_nothing_that_draws():
    script = """
import sys
from cli.main import main
assert main(["chat", "--help"]) == 0
slow = [name for name in ("torch", "rich", "prompt_toolkit", "markdown_it") if name in sys.modules]
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_script_imports_nothing_that_draws(tmp_path):
    """The imports of the module and of all that a script uses; no model is needed to see them."""
    script = """
import sys
import cli.chat, cli.chat_commands, cli.chat_files, cli.chat_input, cli.chat_view
slow = [name for name in ("torch", "rich", "prompt_toolkit", "markdown_it") if name in sys.modules]
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
