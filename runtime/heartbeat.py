"""Who is still there: ranks tell one another so every half second, beside MPI, in which a rank that hangs makes all others wait for ever.

Datagrams (UDP) between threads of their own: a process that was stopped, and a host that is gone, fall silent; one that computes for
long does not. Whoever was heard once and then not for `PATIENCE` seconds ends the job, with a line that names it.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from rewrite.errors import RewriteError

if TYPE_CHECKING:
    from rewrite.runtime.communication import Communicator

EVERY, PATIENCE = 0.5, 6.0  # seconds
VARIABLE = "REWRITE_PATIENCE"  # seconds of silence instead of these; 0: nobody listens
TURN = 1.0  # seconds that a rank lets those before it speak first
TOKEN = 16  # bytes that strangers do not know
CARD = struct.Struct(f"<{TOKEN}s64s16sHI")  # token, host, address, port, process
BEAT = struct.Struct(f"<{TOKEN}sI?")  # token, rank, whether it ends


def patience() -> float:
    """Seconds after which a silent rank has ended. Raises RewriteError if the environment says no number."""
    text = os.environ.get(VARIABLE, "")
    try:
        found = float(text) if text else PATIENCE
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e6:
        raise RewriteError(f"{VARIABLE}={text!r}: write seconds of silence after which a rank is given up, or 0 for never")
    return found


def _address() -> str:
    """An address of this host that others may know; that of the loop if it has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


class Heartbeat:
    """A context in which this rank is heard and hears the others. All ranks enter it at the same time."""

    def __init__(self, communicator: Communicator):
        self.communicator, self.patience = communicator, patience()
        self.ended = threading.Event()
        self.heard: dict[int, float] = {}  # when, by rank
        self.cards: list[tuple[bytes, str, str, int, int]] = []

    def __enter__(self) -> Heartbeat:
        if not min(struct.unpack("d", d)[0] for d in self.communicator.exchange(struct.pack("d", self.patience))):
            self.ended.set()
            return self
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("", 0))
        self.socket.settimeout(EVERY / 4)
        host = socket.gethostname().encode()[:64]
        card = CARD.pack(secrets.token_bytes(TOKEN), host, _address().encode()[:16], self.socket.getsockname()[1], os.getpid())
        cards = [CARD.unpack(d) for d in self.communicator.exchange(card)]
        self.token = cards[0][0]
        near = [c[1] == host.ljust(64, b"\0") for c in cards]  # on this host
        self.places = [("127.0.0.1" if here else c[2].rstrip(b"\0").decode(), c[3]) for c, here in zip(cards, near, strict=True)]
        self.names = [f"host {c[1].rstrip(b'%c' % 0).decode(errors='replace')}, process {c[4]}" for c in cards]
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._speak, self._listen)]
        self._tell(False)  # at once: who has not been heard yet is not missed
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended.is_set():
            self.ended.set()
            self._tell(True)

    def _tell(self, ends: bool) -> None:
        beat = BEAT.pack(self.token, self.communicator.rank, ends)
        for rank, place in enumerate(self.places):
            if rank != self.communicator.rank:
                try:
                    self.socket.sendto(beat, place)
                except OSError:  # there is no way to it: then it is not heard either, and not watched
                    continue

    def _speak(self) -> None:
        while not self.ended.wait(EVERY):
            self._tell(False)

    def _listen(self) -> None:
        before = time.monotonic()
        while not self.ended.is_set():
            self._receive()
            now = time.monotonic()
            if now - before > self.patience / 2:  # it was this process that stood still
                self.heard = dict.fromkeys(self.heard, now)
            before = now
            silent = sorted(rank for rank, heard in self.heard.items() if now - heard > self.patience)
            first = min(set(range(self.communicator.size)) - set(silent))
            if silent and (self.communicator.rank == first or now - self.heard[silent[0]] > self.patience + TURN):
                self._give_up(silent[0], now - self.heard[silent[0]])

    def _receive(self) -> None:
        try:
            data = self.socket.recv(64)
        except OSError:
            return
        if len(data) != BEAT.size:
            return
        token, rank, ends = BEAT.unpack(data)
        if not secrets.compare_digest(token, self.token) or not 0 <= rank < self.communicator.size:
            return
        if ends:
            self.heard.pop(rank, None)
        else:
            self.heard[rank] = time.monotonic()

    def _give_up(self, rank: int, silence: float) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        click.echo(f"rewrite: rank {rank} ({self.names[rank]}) has not been heard of for {silence:.0f} s: it was stopped, or its host is gone; ending all ranks", err=True)
        sys.stderr.flush()
        threading.Timer(1.0, os._exit, (1,)).start()  # should MPI not be able to
        self.communicator.abort(1)
