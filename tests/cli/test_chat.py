"""``swapless run --chat`` as a person sees it, at a real terminal: editing, history, commands, Ctrl-C for the answer alone."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from swapless.cli.main import main; main()"]
PATIENCE_S = 300
AGAIN_S = 1


class Terminal:
    """A process at a pseudo-terminal of its own."""

    def __init__(self, *arguments, env=None) -> None:
        self.shown = ""
        self._place = 0
        self._own, other = pty.openpty()
        # a session of its own whose terminal this is, so that Ctrl-C reaches it as from a keyboard
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm"} | (env or {}),
            preexec_fn=_take_terminal,
        )
        os.close(other)

    def until(self, words: str, again: str = "") -> str:
        """Read until ``words`` come after what was read up to before; returns what came.

        ``again`` is pressed once more every second until then. A Ctrl-C in the instant between Python's own look at
        signals and its wait for a key is only seen with the next key, at every prompt of Python's; a person presses again.
        """
        end, press = time.monotonic() + PATIENCE_S, time.monotonic() + AGAIN_S
        while words not in self.shown[self._place :]:
            assert time.monotonic() < end, f"no {words!r} in {self.shown[self._place :]!r}"
            if again and time.monotonic() > press:
                press = time.monotonic() + AGAIN_S
                self.type(again)
            if select.select([self._own], [], [], 1.0)[0]:
                try:
                    piece = os.read(self._own, 65536).decode("utf-8", errors="replace")
                except OSError:  # the other side is closed
                    piece = ""
                assert piece, f"the process ended before {words!r}: {self.shown!r}"
                self.shown += re.sub(r"\x1b\[\?2004[hl]\r?", "", piece)
        start, self._place = self._place, self.shown.index(words, self._place) + len(words)
        return self.shown[start : self._place]

    def type(self, keys: str) -> None:
        """Press keys; ``\\n`` is Return."""
        os.write(self._own, keys.replace("\n", "\r").encode())

    def end(self) -> int:
        """Wait for the end, reading on."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._own], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._own, 65536).decode("utf-8", errors="replace")
                except OSError:
                    break
        return self.process.wait(timeout=60)

    def close(self) -> None:
        """Leave nothing running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._own)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def chat(endless, tmp_path):
    terminals = []

    def begin(*arguments):
        options = ("--resident", "100%", "--threads", 1, "--prefetch", "none", *arguments)
        terminals.append(Terminal("run", endless, "--chat", *options, env={"XDG_STATE_HOME": str(tmp_path / "state")}))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def test_a_conversation_at_a_terminal(chat, tmp_path):
    terminal = chat("--max-new-tokens", 900)
    terminal.until("/help")
    terminal.until("> ")

    terminal.type("Hello\n")  # an answer that never ends by itself, stopped after some of it was seen
    terminal.until("Hello\r\n")
    terminal.until(" ")
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("> ")

    terminal.type("/hlp" + "\x1b[D" * 2 + "e\n")  # left, left, and the missing letter
    assert "/save FILE" in terminal.until("stand several.")
    terminal.until("> ")

    terminal.type("/sytem\n")
    assert "Unknown command" in terminal.until("Did you mean '/system'?")
    terminal.until("> ")

    terminal.type("half a line\x03")
    terminal.until("leaves.)", again="\x03")
    terminal.until("> ")

    terminal.type(f"/save {tmp_path / 'talk.json'}\n")
    terminal.until("Wrote ")
    terminal.until("> ")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "Hello" and saved[1]["content"].strip()

    terminal.type("\x1b[A\n")  # the line before once more: a file that is there by now
    terminal.until("exists already")
    terminal.until("> ")

    terminal.type("/exit\n")
    assert terminal.end() == 0, terminal.shown
    assert "The last answer" in terminal.shown and "Traceback" not in terminal.shown
    history = tmp_path / "state" / "swapless" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "/sytem" in history.read_text()


@pytest.mark.slow
def test_several_lines_and_the_end_of_input(chat, tmp_path):
    terminal = chat("--max-new-tokens", 3)
    terminal.until("> ")
    terminal.type('"""one\n')
    terminal.until(". ")
    terminal.type('two"""\n')
    terminal.until("(cut after 3 tokens")
    terminal.until("> ")
    terminal.type("three \\\n")
    terminal.until(". ")
    terminal.type("four\n")
    terminal.until("(cut after 3 tokens")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path / 'talk'}\n")
    terminal.until("Wrote ")
    terminal.until("> ")
    text = (tmp_path / "talk").read_text()
    assert "user:\none\ntwo\n" in text and "user:\nthree\nfour\n" in text
    terminal.type("\x04")
    assert terminal.end() == 0, terminal.shown


def test_ctrl_c_while_loading_ends_the_program(chat):
    terminal = chat("--max-new-tokens", 3)
    terminal.until("\x1b")  # the bar of loading is drawn
    terminal.type("\x03")
    assert terminal.end() == 130, terminal.shown
    assert "Traceback" not in terminal.shown


@pytest.fixture
def talk(swapless, checkpoint):
    def call(text, *arguments, folder=checkpoint):
        options = ("--resident", "50%", "--threads", 1, "--max-new-tokens", 3, *arguments)
        return swapless("run", folder, "--chat", *options, input=text)

    return call


def test_commands_from_a_pipe(talk, tmp_path):
    target = tmp_path / "talk.json"
    said = f"/system Be kind.\nHello\n/save {target}\n/nope\n/clear\n/etc/passwd is what?\n/save {target} --force\n"
    said += "/system\n/save\n"
    done = talk(said)
    assert done.exit_code == 0, done.stderr
    assert "Unknown command /nope" in done.stderr and "Name a file" in done.stderr
    saved = json.loads(target.read_text())
    assert [turn["content"] for turn in saved[:2]] == ["Be kind.", "/etc/passwd is what?"]
    assert len(saved) == 3


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "target", ["{checkpoint}/model.safetensors --force", "{checkpoint}", "/no/such/folder/x", "/dev/full --force"]
)
def test_what_cannot_be_saved(talk, checkpoint, copy, target):
    before = (copy / "model.safetensors").read_bytes()
    done = talk(f"Hello\n/save {target.format(checkpoint=copy)}\n", folder=copy)
    assert done.exit_code == 0 and "Error: " in done.stderr and "Traceback" not in done.stderr
    assert (copy / "model.safetensors").read_bytes() == before


def test_bytes_that_are_no_text(talk):
    done = talk(b"caf\xe9\nHello\n")
    assert done.exit_code == 0 and "not UTF-8" in done.stderr and done.stdout.strip()


def test_a_template_that_refuses_ends_before_the_first_line(talk, copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('Only with images') }}")
    done = talk("Hello\n", folder=copy)
    assert (done.exit_code, done.stdout) == (2, "") and "Only with images" in done.stderr
    done = talk("", "--prompt", "Hello", folder=copy)
    assert (done.exit_code, done.stdout) == (2, "") and "Only with images" in done.stderr


def test_a_template_without_a_system_message(talk, copy):
    refusing = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (copy / "chat_template.jinja").write_text("{% for m in messages %}" + refusing + "{{ m.content }}{% endfor %}")
    done = talk("/system Be kind.\nHello\n", folder=copy)
    assert done.exit_code == 0 and "no system" in done.stderr and done.stdout.strip()
