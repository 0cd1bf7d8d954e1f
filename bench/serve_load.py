"""The server under load, abuse and hang-ups: `python bench/serve_load.py runs/demo/release`.

Starts the real server in a process of its own and prints, and writes to
bench/results/serve.json: answers of 64 clients against the same questions asked one at a time,
the p95 of others beside 200 sockets that send a byte a second, 2,000 fuzzed bodies, 500 streams
hung up on, memory before and after, and the time to the first token on an idle machine.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintune import console, files

PATH = "/v1/chat/completions"
COMPANIES = ("Acme", "Borealis", "Cobalt", "Delta", "Ember", "Fjord", "Granite", "Harbor")


@dataclass
class Target:
    """Where the server listens, and its process."""

    port: int
    pid: int

    def rss_mb(self) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def cpu_s(self) -> float:
        """User and system seconds of the server so far; a neighbour does not change them."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Client:
    """One keep-alive connection that speaks just enough HTTP."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes, path: str = PATH) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-len"))
        content = await reader.readexactly(length)
        if "connection: close" in lines:
            self.close()
        return int(lines[0].split()[1]), content

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None


def question(number: int, **more: Any) -> bytes:
    company, low = COMPANIES[number % len(COMPANIES)], 100 + number
    text = (
        f"{company} {number} reported revenue of ${low}.5 million, up from ${low - 7}.0 million."
        " What is the growth rate?"
    )
    body = {"model": "adapter" if number % 2 else "base", "max_tokens": 24}
    return json.dumps(body | {"messages": [{"role": "user", "content": text}]} | more).encode()


def text_of(content: bytes) -> str:
    return str(json.loads(content)["choices"][0]["message"]["content"])


async def concurrency(target: Target, distinct: int, clients: int, requests: int) -> dict[str, Any]:
    """Five rounds of both kinds in turn, so that a busy machine weighs on both alike."""
    # Sampled, each with its own seed: the answers differ, so a mixed one cannot pass for right.
    bodies = [question(number, temperature=1.0, seed=number) for number in range(distinct)]
    alone, rounds = list[str](), 5
    wrong, status = 0, dict[int, int]()
    wall, cpu = [0.0, 0.0], [0.0, 0.0]

    async def worker(left: list[int]) -> None:
        nonlocal wrong
        mine = Client(target.port)
        while left:
            number = left.pop() % len(alone)
            code, content = await mine.post(bodies[number])
            status[code] = status.get(code, 0) + 1
            wrong += code != 200 or text_of(content) != alone[number]
        mine.close()

    for at in range(rounds):
        client = Client(target.port)  # the last round's idled out
        marks = [(time.perf_counter(), target.cpu_s())]
        for body in bodies[at * distinct // rounds : (at + 1) * distinct // rounds]:
            alone.append(text_of((await client.post(body))[1]))
        marks.append((time.perf_counter(), target.cpu_s()))
        left = list(range(requests // rounds))
        await asyncio.gather(*(worker(left) for _ in range(clients)))
        marks.append((time.perf_counter(), target.cpu_s()))
        for kind in (0, 1):
            wall[kind] += marks[kind + 1][0] - marks[kind][0]
            cpu[kind] += marks[kind + 1][1] - marks[kind][1]
    counts = len(alone), requests // rounds * rounds
    rates = [counts[kind] / wall[kind] for kind in (0, 1)]
    return {
        "clients": clients,
        "requests": counts[1],
        "status": {str(code): count for code, count in sorted(status.items())},
        "wrong_or_mixed": wrong,
        "distinct_answers": len(set(alone)),
        "requests_per_second_one_at_a_time": round(rates[0], 2),
        "requests_per_second_together": round(rates[1], 2),
        "ratio": round(rates[1] / rates[0], 2),
        "server_cpu_ms_a_request": [
            round(1000 * c / n, 1) for c, n in zip(cpu, counts, strict=True)
        ],
        "ratio_by_server_cpu": round(cpu[0] / counts[0] / (cpu[1] / counts[1]), 2),
    }


async def p95(target: Target, rounds: int) -> float:
    client, times = Client(target.port), []
    for number in range(rounds):
        start = time.perf_counter()
        await client.post(question(number, max_tokens=4))
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=20)[18]


async def slow_sockets(target: Target, count: int, rounds: int) -> dict[str, Any]:
    """Alternate quiet and beset rounds, so that a busy machine weighs on both alike."""
    held: list[float] = []

    async def trickle() -> None:
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        closed = asyncio.ensure_future(reader.read())
        for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"y" * 60:
            if closed.done():
                break
            writer.write(bytes([byte]))
            await asyncio.wait({closed}, timeout=1.0)
        closed.cancel()
        writer.close()
        held.append(time.perf_counter() - start)

    quiet, beset = [], []
    for _ in range(5):
        quiet.append(await p95(target, rounds))
        sockets = [asyncio.ensure_future(trickle()) for _ in range(count)]
        await asyncio.sleep(0.5)
        beset.append(await p95(target, rounds))
        await asyncio.gather(*sockets, return_exceptions=True)
    return {
        "sockets": count,
        "longest_held_s": round(max(held), 2),
        "p95_ms_quiet": round(1000 * statistics.median(quiet), 1),
        "p95_ms_beset": round(1000 * statistics.median(beset), 1),
        "ratio": round(statistics.median(beset) / statistics.median(quiet), 3),
    }


def fuzzed(rng: random.Random) -> bytes:
    """A body that is wrong somewhere: structure, type, size, or bytes."""
    tree: dict[str, Any] = json.loads(question(rng.randrange(99)))
    values: list[Any] = [
        None, True, -1, 0, 10**30, 1e308, "", "x" * 5000, [], {}, [[]], {"a": {"b": []}},
        "\ud800", [None] * 300, {"$ref": "#"}, "../../etc/passwd", "http://127.0.0.1:1/",
    ]  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        tree[rng.choice(["model", "messages", "n", "stop", "seed"])] = rng.choice(values[1:])
        tree["nonce"] = 1
    elif kind == 1:
        tree[f"field{rng.randrange(99)}"] = rng.choice(values)
    elif kind == 2:
        tree["messages"] = [{"role": rng.choice(["x", "tool", 5]), "content": rng.choice(values)}]
    elif kind == 3:
        tree["messages"] = [{"role": "user", "content": "a"}] * rng.choice([2, 300, 20_000])
    text = json.dumps(tree).encode()
    if kind == 4:
        at = rng.randrange(len(text) - 1)
        return text[:at] + bytes([rng.randrange(128, 256)]) + text[at + 1 :]
    return text[: rng.randrange(len(text))] if kind == 5 else text


async def fuzz(target: Target, count: int) -> dict[str, Any]:
    rng, status, misshapen = random.Random(7), dict[int, int](), 0
    client = Client(target.port)
    before = target.rss_mb()
    for _ in range(count):
        code, content = await client.post(fuzzed(rng))
        status[code] = status.get(code, 0) + 1
        if not (400 <= code < 500 and json.loads(content)["error"]["message"]):
            misshapen += 1
    code, _ = await client.post(question(1))
    return {
        "bodies": count,
        "status": {str(code): number for code, number in sorted(status.items())},
        "not_4xx_in_shape": misshapen,
        "next_request": code,
        "rss_growth_mb": round(target.rss_mb() - before, 1),
    }


async def aborts(target: Target, count: int, at_once: int) -> dict[str, Any]:
    body = question(3, stream=True, max_tokens=300)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    async def once() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"data: {")
        writer.transport.abort()

    async def batch() -> None:
        for _ in range(count // at_once):
            await asyncio.gather(*(once() for _ in range(at_once)))

    await batch()  # the allocator's pools fill once; what grows after that is a leak
    before = target.rss_mb()
    await batch()
    for _ in range(200):
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        state = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        writer.close()
        if state["running"] == state["waiting"] == 0:
            break
        await asyncio.sleep(0.05)
    growth = round(target.rss_mb() - before, 1)
    return {"streams": count, "rows_left": state["running"], "rss_growth_mb": growth}


async def first_token(target: Target, rounds: int) -> dict[str, Any]:
    body, times = question(5, stream=True), []
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(rounds):
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(2):  # the first event only opens the assistant's turn
            await reader.readuntil(b"data: {")
        times.append(1000 * (time.perf_counter() - start))
        await reader.read()
        writer.close()
    return {"rounds": rounds, "median_ms": round(statistics.median(times), 1),
            "worst_ms": round(max(times), 1)}  # fmt: skip


async def measure(target: Target, scale: float, only: list[str]) -> dict[str, Any]:
    await p95(target, 10)  # warm up
    many, found = max(8, int(1000 * scale)), dict[str, Any]()
    works: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
        "first_token": lambda: first_token(target, 20),
        "concurrency": lambda: concurrency(target, max(8, many // 5), 64, many),
        "slow_sockets": lambda: slow_sockets(target, 200, max(20, int(60 * scale))),
        "fuzz": lambda: fuzz(target, max(50, int(2000 * scale))),
        "aborts": lambda: aborts(target, max(20, int(500 * scale)), 20),
    }
    for name in only or works:
        found[name] = await works[name]() | {"scale": scale, "load_average_1m": os.getloadavg()[0]}
        console.say(f"{name}: {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path, nargs="?", default=Path("runs/demo/release"))
    parser.add_argument("--base", type=Path, help="folder of the base, where it is not found")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--only", nargs="*", default=[], help="measure these, keep the others")
    options = parser.parse_args()
    code = (
        "import sys, pathlib; from fintune.serve.app import serve;"
        " serve(pathlib.Path(sys.argv[1]), port=int(sys.argv[2]), base=next(map(pathlib.Path,"
        " sys.argv[3:]), None))"
    )
    command = [sys.executable, "-c", code, str(options.release), str(options.port)]
    command += [str(options.base)] if options.base else []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", options.port)).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.2)
        found = asyncio.run(measure(Target(options.port, process.pid), options.scale, options.only))
    finally:
        process.terminate()
        process.wait(timeout=90)
    found["machine"] = {"cores": os.cpu_count(), "server_exit_code": process.returncode}
    path = Path(__file__).parent / "results" / "serve.json"
    old = files.read_json(path) if options.only and path.is_file() else {}
    files.write_json(path, old | found)
    console.emit_json(found)


if __name__ == "__main__":
    main()
