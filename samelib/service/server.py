"""uvicorn with what it leaves to others: a deadline for headers, and a way to run inside a notebook."""

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
STOP_SECONDS = 30  # in which accepted requests are answered when the service stops


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose headers do not arrive in time; uvicorn itself waits for ever."""

    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # these bytes were no whole header
            self._arm()
        else:
            self._disarm()

    def connection_lost(self, exc) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_SLOW)
            self.transport.close()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: a taken port is known before models are loaded.

    Raises:
        OSError: the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sends at once only where it says TCP
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot serve on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as clients write it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI) -> uvicorn.Server:
    """The server of an app made by `create_app`, with its limits. It writes no access log: paths come from clients."""
    limits = app.state.limits
    protocol = type("Protocol", (DeadlineProtocol,), {"header_seconds": limits.header_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then answers what it accepted and exits with 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # uvicorn raises the signal once more after its stop
    make_server(app).run(sockets=[bound])


@contextmanager
def running(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves from a thread of this process while the block runs; gives the URL. Port 0 takes a free one.

    Raises:
        OSError: the address is taken.
        RuntimeError: the app does not start (its log says why).
    """
    bound, server = bound_socket(host, port), make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the service did not start; its log says why")
            time.sleep(0.01)
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
