"""Work on an untrusted folder in a forked child with limits on time and memory.

The child is forked after the imports, so that they are paid once. It writes no file, reads no
terminal, and its death is a refusal with the reason.
"""

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import psutil

from fintune import errors
from fintune.errors import FintuneError, GateRefused

CPU_S = 20
"""Processor time of the child itself."""
CLOCK_S = 120
MEMORY = 2 * 2**30
"""Resident bytes beyond the parent's at the fork."""
_POLL_S = 0.02
_ANSWER = 8 * 2**20
"""Largest result in bytes; a longer one is a hostile one."""


def run_limited(work: Callable[[], Any], subject: str) -> Any:
    """Run `work` in a child; its result must be JSON.

    Args:
        subject: the folder, for messages.

    Raises:
        GateRefused: the child raised, died or passed a limit.
        FintuneError: what `work` raised of the error tree, as the same class.
    """
    read_end, write_end = os.pipe()
    memory = psutil.Process().memory_info().rss + MEMORY
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _work_and_exit(work, write_end)
    os.close(write_end)
    status, data, passed = None, b"", ""
    try:
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            data, passed = _receive(pipe, child, memory)
        if passed:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        if status is None:  # a signal of ours came in between
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    try:
        answer = json.loads(data)
    except ValueError:
        raise _refusal(subject, passed or _death(status)) from None
    if "result" in answer:
        return answer["result"]
    raise _raised(subject, answer)


def _receive(pipe: Any, child: int, memory: int) -> tuple[bytes, str]:
    """What the child wrote until it closed the pipe, or the limit that it passed."""
    parts: list[bytes] = []
    size, end = 0, time.monotonic() + CLOCK_S
    process = psutil.Process(child)
    while True:
        if select.select([pipe], [], [], _POLL_S)[0]:
            part = pipe.read(65_536)
            if not part:
                return b"".join(parts), ""
            parts.append(part)
            size += len(part)
        try:
            resident = process.memory_info().rss
        except psutil.Error:
            resident = 0
        if resident > memory:
            return b"", f"it takes more than {MEMORY / 2**30:.0f} GB of memory"
        if time.monotonic() > end:
            return b"", f"it takes longer than {CLOCK_S} s"
        if size > _ANSWER:
            return b"", f"its answer is longer than {_ANSWER / 2**20:.0f} MB"


def _work_and_exit(work: Callable[[], Any], pipe: int) -> NoReturn:
    """The child: set its limits, work, write the result to the pipe, and exit."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(CLOCK_S)  # also where the parent is killed
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        # A lock that the parent holds on an open file would outlive a kill of the parent.
        os.closerange(3, pipe)
        os.closerange(pipe + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
        answer: dict[str, Any]
        try:
            answer = {"result": work()}
        except FintuneError as error:
            answer = {
                "class": type(error).__name__,
                "what": error.what,
                "why": error.why,
                "fix": error.fix,
            }
        except MemoryError:
            answer = {"what": "it takes more memory than there is"}
        except RecursionError:
            answer = {"what": "it is nested too deeply"}
        except Exception as error:  # whatever transformers, peft or a template raise: refused
            answer = {"what": f"{type(error).__name__}: {str(error)[:300]}"}
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(pipe, data) :]
    finally:
        os._exit(0)


def _death(status: int | None) -> str:
    number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return f"it takes more than {CPU_S} s of processor time"
    if number == signal.SIGKILL:
        return "the process that read it was killed, as one that takes too much memory is"
    if number == signal.SIGALRM:
        return f"it takes longer than {CLOCK_S} s"
    if number == signal.SIGXFSZ:
        return "it writes a file"
    return f"reading it ends the process (signal {number})" if number else "reading it ends early"


def _raised(subject: str, answer: dict[str, str]) -> FintuneError:
    kind = getattr(errors, answer.get("class", ""), None)
    if kind is None:
        return _refusal(subject, answer["what"])
    error: FintuneError = kind(answer["what"], why=answer["why"], fix=answer["fix"])
    return error


def _refusal(subject: str, reason: str) -> GateRefused:
    return GateRefused(
        f"{subject} is refused: {reason}",
        why="it was read in a process of its own with limits on time and memory",
        fix="get the folder from its source again, or use another one",
    )
