"""`flash-mla chat` in a terminal of its own, and without one."""

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from live_server import PATIENCE, PROGRAM, ROOT

MODEL = ROOT / "models" / "small"
FLAGS = ["-m", str(MODEL), "--precision", "fp32", "--temperature", "0", "--num-pages", "64"]


class Terminal:
    def __init__(self, *flags):
        main, other = pty.openpty()
        self.process = subprocess.Popen([PROGRAM, "chat", *FLAGS, *flags], stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=self.take_terminal)
        os.close(other)
        self.main, self.text = main, ""

    @staticmethod
    def take_terminal():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, pattern, seconds=PATIENCE):
        """Reads up to what matches, and takes it away with all before it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.main, 65536).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # it has ended
                    assert re.search(pattern, self.text), f"no {pattern!r} in {self.text!r}"
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def say(self, line):
        os.write(self.main, line.encode() + b"\n")
        self.until(re.escape(line) + "\n")  # the terminal's echo

    def interrupt(self):
        os.write(self.main, b"\x03")

    def end(self):
        try:
            return self.process.wait(timeout=PATIENCE)
        finally:
            self.process.kill()
            os.close(self.main)


PROMPT = r"\n> "


def test_a_talk():
    t = Terminal("--max-tokens", "12", "--system", "Be brief.")
    t.until(r"/help, /exit\)" + PROMPT)
    t.say("The family of Dashwood")
    answer = t.until(PROMPT)[: -len("\n> ")]
    assert answer.strip()
    t.say("/history")
    history = t.until(PROMPT)
    assert history.startswith("system: Be brief.\nuser: The family of Dashwood\nassistant: ") and answer.strip() in history
    t.say("/reset")
    t.until("forgotten" + r"\)" + PROMPT)
    t.say("/history")
    assert t.until(PROMPT) == "system: Be brief.\n> "
    t.say("The family of Dashwood")  # the same again, for nothing is remembered
    assert t.until(PROMPT)[: -len("\n> ")] == answer
    t.say("/hlep")
    t.until("there is no /hlep")
    t.say("/help")
    assert "Ctrl-C" in t.until(PROMPT)
    t.say("two \\")
    t.until(r"^\. ")
    t.say("lines")
    t.until(PROMPT)
    t.say("/history")
    assert "user: two \nlines\n" in t.until(PROMPT)
    t.say("/exit")
    assert t.end() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_talk():
    t = Terminal("--ignore-eos", "--max-tokens", "1000000")
    t.until(PROMPT)
    t.say("The family")
    t.until(r"\w+ \w+")  # it has begun
    t.interrupt()
    t.until(r"\(stopped\)" + PROMPT)
    t.interrupt()  # where there is nothing to stop
    t.until(r"/exit or Ctrl-D to leave\)" + PROMPT)
    t.say("/history")
    history = t.until(PROMPT)
    assert history.startswith("user: The family\nassistant: ") and len(history) > len("user: The family\nassistant: \n> ")
    os.write(t.main, b"\x04")
    assert t.end() == 0


def answer(*flags, text=None):
    p = subprocess.run([PROGRAM, "chat", *FLAGS, "--max-tokens", "8", *flags], capture_output=True, text=True, timeout=PATIENCE, **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}))
    return p.returncode, p.stdout, p.stderr


def test_without_a_terminal(tmp_path):
    code, piped, err = answer(text="The family\n")
    assert code == 0 and piped.strip() and "loading" in err and "\x1b" not in err and "> " not in piped
    assert answer("-p", "The family", "--quiet") == (0, piped, "")
    assert answer("-p", "-", "--quiet", text="The family") == (0, piped, "")
    file = tmp_path / "message.txt"
    file.write_text("The family\n")
    assert answer("-f", str(file), "--quiet") == (0, piped, "")
    both = answer("-p", "The family", "--quiet", text="of Dashwood")
    assert both == answer("-p", "The family\n\nof Dashwood", "--quiet")
    code, out, err = answer(text="")
    assert code == 2 and "standard input is empty" in err and not out
    code, _, err = answer("-p", "a", "--chat-template-kwargs", "{")
    assert code != 0 and "chat_template_kwargs" in err


@pytest.mark.parametrize("verbose", [False, True])
def test_loading_is_told_in_lines(verbose):
    _, _, err = answer("-p", "a", *(["--verbose"] if verbose else []))
    lines = [x for x in err.splitlines() if x.startswith("flash-mla chat: ")]
    assert re.fullmatch(r"flash-mla chat: loading \d+\.\d MiB of weights in \d+ layers", lines[0])
    assert re.fullmatch(r"flash-mla chat: loaded \d+\.\d MiB of weights in \d+ layers in \d+\.\d s", lines[-1])
    assert (len(lines) > 2) == verbose


def test_a_signal_that_is_not_caught_ends_it():
    t = Terminal()
    t.until(PROMPT)
    t.process.send_signal(signal.SIGTERM)
    assert t.end() == -signal.SIGTERM
