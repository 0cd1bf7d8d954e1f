"""Work on an untrusted folder in a forked child with limits on time and memory.

The child is forked after the imports, so that they are paid once. It writes no file, reads no
terminal, and its death is a refusal with the reason.
"""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

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
_LIMITS = f"{CPU_S} s of processor time, {CLOCK_S} s, {MEMORY >> 30} GB of memory, no file written"


def run_limited(work: Callable[[], Any], subject: str) -> Any:
    """Run `work` in a child; its result must be JSON.

    Args:
        subject: the folder, for messages.

    Raises:
        GateRefused: the child raised, died or passed a limit.
        FintuneError: what `work` raised of the error tree, as the same class.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work_and_exit, args=(work, sender))
    memory = psutil.Process().memory_info().rss + MEMORY
    child.start()
    answer = dict[str, Any]()
    try:
        sender.close()
        while not receiver.poll(_POLL_S) and child.is_alive():
            with suppress(psutil.Error):
                if psutil.Process(child.pid).memory_info().rss > memory:
                    child.kill()
        with suppress(EOFError, OSError, ValueError):
            answer = json.loads(receiver.recv_bytes(_ANSWER)) if receiver.poll() else {}
    finally:  # also where a signal of ours came in between
        receiver.close()
        child.kill()
        child.join()
    if "result" in answer:
        return answer["result"]
    if kind := getattr(errors, answer.pop("class", ""), None):
        raise kind(**answer)
    raise GateRefused(
        f"{subject} is refused: {answer.get('what', 'reading it crashed or passed a limit')}",
        why=f"it was read in a process of its own, with limits: {_LIMITS}",
        fix="get the folder from its source again, or use another one",
    )


def _work_and_exit(work: Callable[[], Any], pipe: Connection) -> None:
    """The child: set its limits, work, write the result to the pipe, and exit."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(CLOCK_S)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    # A lock that the parent holds on an open file would outlive a kill of the parent.
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    try:
        answer: dict[str, Any] = {"result": work()}
    except FintuneError as error:
        answer = {"class": type(error).__name__, **vars(error)}
    except Exception as error:  # whatever transformers, peft or a template raise: refused
        answer = {"what": f"{type(error).__name__}: {str(error)[:300]}"}
    pipe.send_bytes(json.dumps(answer).encode())
    os._exit(0)
