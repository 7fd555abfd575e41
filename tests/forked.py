"""The command in a process of its own, which is there at once: forked from one that has loaded all that it needs.

Pids, signals, descriptors, limits, locks and how it ends are those of any process; only the loading, some seconds of
each, is done once. What is about the start itself (the interpreter, its flags, the environment that it is told) needs a
real start: `cold_start`. Forking is safe only while there is one thread, so the server computes nothing, and checks.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from conftest import for_scripts

USUAL: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
SCRIPT = Path(__file__).parent.parent / "deepstyle.py"


def cold_start(*arguments, **options):
    """The command started as a person does it."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


class Lines:
    """What a process writes, a line at a time; what is behind a line is left for `communicate`."""

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def readline(self):
        line = b""
        while not line.endswith(b"\n") and (more := os.read(self._descriptor, 1)):
            line += more
        return line.decode()


class Process:
    """A forked command, with as much of subprocess.Popen as tests need.

    terminal: a descriptor that is its stdout and stderr instead of pipes. asked: `ignored` signals, as by nohup;
    `closed` descriptors, as by 2>&-; `code` to run instead of deepstyle.py.
    """

    def __init__(self, arguments, *, cwd=None, env=None, terminal=None, **asked):
        self.returncode, self._said = None, [b"", b""]
        out, err = os.pipe(), os.pipe()
        self._ends = [out[0], err[0]]
        self._server, theirs = socket.socketpair()
        asked |= {
            "arguments": [os.fsencode(str(one)).decode("latin-1") for one in arguments],
            "cwd": os.fsencode(cwd or os.getcwd()).decode("latin-1"),
            "env": dict(os.environ if env is None else env),
        }
        # One of the ends of a pair of sockets goes with what is asked: over the other the server says how it ended.
        outs = [out[1], err[1]] if terminal is None else [terminal, terminal]
        given = [*outs, theirs.fileno()]
        server = forking_server()
        socket.send_fds(server, [len(data := json.dumps(asked).encode()).to_bytes(4, "big")], given)
        server.sendall(data)
        for end in (out[1], err[1]):
            os.close(end)
        theirs.close()
        self.pid = int(self._line())
        self.stdout, self.stderr = map(Lines, self._ends)
        self._threads = None

    def _line(self):
        """What the server says next, or "" if it has ended."""
        line = b""
        while not line.endswith(b"\n") and (more := self._server.recv(1)):
            line += more
        return line.decode()

    def poll(self):
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.returncode = int(self._line())
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([self._server], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("the forked command", timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """What it wrote to stdout and stderr, once it has ended."""

        def read(number):
            while data := os.read(self._ends[number], 65536):
                self._said[number] += data

        if not self._threads:
            self._threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in (0, 1)]
            for thread in self._threads:
                thread.start()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired("the forked command", timeout)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        for descriptor in self._ends:
            os.close(descriptor)
        return tuple(said.decode() for said in self._said)

    def close_stdout(self):
        """As a reader that has had enough, like head."""
        os.close(self._ends[0])
        self._ends[0] = os.open(os.devnull, os.O_RDONLY)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(*arguments, **options):
    """The command with these arguments, as a process that is under way. options: as Process takes them."""
    return Process(arguments, **options)


def run(*arguments, timeout=120, **options):
    """The command until it has ended, as subprocess.run gives it."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@functools.cache
def forking_server():
    """The socket of the server for this process, which ends with it."""
    ours, theirs = socket.socketpair()
    # With an arena for each thread, what malloc holds back depends on which threads happened to need most at once.
    environment = for_scripts(MALLOC_ARENA_MAX="1")
    command = [sys.executable, __file__, str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    assert ours.recv(1) == b"+", "the server could not load deepstyle"
    return ours


# ------------------------------------------------------------------------------ in the server


def serve(asking):
    """Fork a command for each message, and say how it ended, until nobody can ask any more."""
    import imageio.v3  # noqa: F401
    import jinja2  # noqa: F401
    import rich.progress  # noqa: F401
    import scipy.optimize  # noqa: F401

    import deepstyle_app.command  # noqa: F401
    from deepstyle_support.backend import import_keras

    import_keras()
    gc.freeze()  # or else each child would copy all of it to look for garbage
    asking.sendall(b"+")
    running: dict[int, tuple] = {}  # {descriptor of a process: (its pid, where to say how it ended)}
    while True:
        for ready in select.select([asking, *running], [], [])[0]:
            if ready is asking:
                head, given, _, _ = socket.recv_fds(asking, 4, 3)
                if not head:
                    return
                asked = json.loads(asking.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
                assert len(os.listdir("/proc/self/task")) == 1, "forking is safe with one thread only"
                pid = os.fork()
                if not pid:
                    for descriptor in (asking.fileno(), given[2], *running):
                        os.close(descriptor)
                    become(asked, given[:2])
                reply = socket.socket(fileno=given[2])
                reply.sendall(f"{pid}\n".encode())
                running[os.pidfd_open(pid)] = pid, reply
                for descriptor in given[:2]:
                    os.close(descriptor)
            else:
                pid, reply = running.pop(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # nobody may want to know
                    reply.sendall(f"{status}\n".encode())
                reply.close()
                os.close(ready)


def become(asked, given):
    """Be the command: this forked process ends as `python deepstyle.py` would."""
    for number, descriptor in enumerate(given, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # As a shell starts it, whatever the tests were started with: nohup, say, is inherited.
    for number, usual in USUAL.items():
        signal.signal(number, signal.SIG_IGN if number in asked.get("ignored", ()) else usual)
    for number in asked.get("closed", ()):
        os.close(number)
    os.chdir(asked["cwd"].encode("latin-1"))
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = [str(SCRIPT), *(os.fsdecode(one.encode("latin-1")) for one in asked["arguments"])]
    if "code" in asked:
        exec(compile(asked["code"], "<code>", "exec"), {"__name__": "__main__"})
        sys.exit()
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
