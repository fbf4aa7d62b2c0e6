"""One error of several processes is said once: torchrun's processes meet in its store before they end.

Process 0 speaks for all that have the same error; a process with one of its own says so itself. Every process waits a
little for the others, since torchrun ends all of them as soon as it sees the first one fail.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

OTHERS = 3.0  # seconds that process 0 waits for the others to have the same error before it speaks
FIRST = 10.0  # seconds that the others wait for process 0 to have spoken


def rank_and_world() -> tuple[int, int]:
    """Who this process is among those that torchrun started; (0, 1) without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def one_voice(text: str) -> Iterator[str | None]:
    """Around saying an error, before the process ends: words for whose it is, "" where it is everybody's, None where
    another says it.

    Args:
        text: of the error; the same one is the same error. Where no store can be reached, every process speaks.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield ""
        return
    own = f" in process {rank} of {world}"
    text = ascii(text)  # names of files may hold what the store cannot
    try:
        board = _Board(rank, world)
        board.put("has", rank, text)
        whose = board.first(text, own) if rank == 0 else board.other(text, rank, own)
    except RuntimeError:  # PyTorch's own errors of a store that is out of reach are such
        yield own
        return
    yield whose
    with contextlib.suppress(RuntimeError):
        board.spoken(text, rank, whose)
    with contextlib.suppress(ValueError):  # not the main thread
        # It ends by itself now; torchrun, which stops all when the first has ended, would change its exit status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Board:
    """What every process has to say, by its rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.world = world
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else process 0 has the store, once it is up
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise RuntimeError("no address of a store") from error
        host = rank == 0 and not agent and not dist.is_initialized()
        if not host and not _wait(lambda: _reachable(address), FIRST):  # PyTorch would print its own stack
            raise RuntimeError("no store there")
        patience = timedelta(seconds=FIRST)
        self._store = dist.TCPStore(*address, is_master=host, wait_for_workers=False, timeout=patience)
        self._prefix = f"flowmo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # the store outlives a restart

    def put(self, what: str, rank: int, text: str = "") -> None:
        self._store.set(f"{self._prefix}/{what}/{rank}", text)

    def there(self, what: str, ranks: Sequence[int]) -> bool:
        return all(self._store.check([f"{self._prefix}/{what}/{rank}"]) for rank in ranks)

    def same(self, text: str, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks that have this error."""
        has = f"{self._prefix}/has"
        return [r for r in ranks if self.there("has", [r]) and self._store.get(f"{has}/{r}").decode() == text]

    def first(self, text: str, own: str) -> str:
        others = range(1, self.world)
        _wait(lambda: self.there("has", others), OTHERS)
        return "" if len(self.same(text, others)) == len(others) else own

    def other(self, text: str, rank: int, own: str) -> str | None:
        _wait(lambda: self.there("spoken", [0]), FIRST)
        return None if self.same(text, range(rank)) else own  # of those that process 0 is not among, the first speaks

    def spoken(self, text: str, rank: int, whose: str | None) -> None:
        """Let the others know, and, as the first, stay until those with the same error have heard."""
        self.put("spoken" if whose is not None else "heard", rank)
        if rank == 0:
            alike = self.same(text, range(1, self.world))
            _wait(lambda: self.there("heard", alike), OTHERS)


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not (true := until()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


def _reachable(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True
