"""A Debian image, used as people use one: each script runs in the same root file system natively and inside, and
the two must say the same.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator

import pytest
from debian_image import Beside
from test_terminal import Person

pytestmark = pytest.mark.timeout(900)

SCRIPTS = pathlib.Path(__file__).with_name("debian")
EXECUTE = {".sh": "bash", ".pl": "perl", ".py": "python3"}


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.iterdir()))
def test_script(name: str, beside: Beside) -> None:
    script = SCRIPTS / name
    assert beside(
        "bash", "-c", f"cat >/tmp/{name} <<'~~~'\n{script.read_text()}~~~\nexec {EXECUTE[script.suffix]} /tmp/{name}"
    )


@pytest.mark.slow
def test_everything_listed(beside: Beside) -> None:
    """Every name, mode, owner and byte of the image but the files that a container gets."""
    script = r"""
        find /usr /etc /var /home /opt /srv -printf '%p %m %U %G %y %l\n' |
            grep -vE '^/etc/(hosts|hostname|resolv.conf) ' | sort | sha256sum
        find /usr -type f | sort | xargs sha256sum | sha256sum"""
    assert beside("bash", "-c", script, timeout=600)


@pytest.fixture(params=["native", "inside"])
def shell(request: pytest.FixtureRequest, kvmsentry: list[str], debian: str) -> Iterator[Person]:
    command = ["bash", "--norc", "--noediting", "-i"]
    native = ["env", "-u", "PS1", "HOME=/", *command]  # whoever runs the tests may have a prompt of his own
    person = Person([*kvmsentry, "run", "-it", debian, *command] if request.param == "inside" else native)
    person.see(r"# ")
    person.type("PS1='ready> '\r")
    person.see(r"\nready> ")
    yield person
    person.close()


def test_jobs_at_a_terminal(shell: Person) -> None:
    def command(text: str, *patterns: str) -> None:
        shell.type(text + "\r")
        for pattern in patterns:
            shell.see(pattern)
        shell.see(r"ready> ")

    command("tty; stty size", r"/dev/pts/\d+", "30 100")
    shell.type("sleep 100\r")
    time.sleep(0.4)
    shell.type("\x03")
    shell.see(r"ready> ")
    command("echo status $?", r"status 130")
    shell.type("sleep 101\r")
    time.sleep(0.4)
    shell.type("\x1a")
    shell.see(r"\[1\]\+\s+Stopped\s+sleep 101")
    shell.see(r"ready> ")
    command("jobs", r"\[1\]\+\s+Stopped\s+sleep 101\r")
    command("bg", r"\[1\]\+ sleep 101 &")
    command("jobs", r"\[1\]\+\s+Running\s+sleep 101 &")
    shell.type("fg\r")
    shell.see(r"sleep 101\r\n")
    time.sleep(0.4)
    shell.type("\x03")
    shell.see(r"ready> ")
    command("cat | cat &", r"\[1\] \d+")
    command("sleep 0.2; jobs", r"\[1\]\+\s+Stopped\s+cat \| cat")  # it read from the terminal: SIGTTIN
    shell.type("fg\r")
    shell.see(r"cat \| cat\r\n")
    shell.type("words\r")
    shell.see(r"words\r\nwords\r\n")
    shell.type("\x04")
    shell.see(r"ready> ")
    command(
        "(trap 'echo interrupted' INT; kill -INT $BASHPID; kill -STOP $BASHPID; echo resumed)", "interrupted", "Stopped"
    )
    command("kill %1; sleep 0.3; jobs", "Terminated")
    command("(sleep 0.2; exit 3) & wait $!; echo $?", r"\n3\r")
    shell.type("sleep 100 | sleep 100\r")
    time.sleep(0.4)
    shell.type("\x1c")
    shell.see(r"Quit.*\n")
    shell.see(r"ready> ")
    shell.type("exit 9\r")
    assert shell.process.wait(30) == 9
