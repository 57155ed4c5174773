"""uvicorn, for a command and for the inside of a notebook. It leaves slow headers to a reverse proxy (book/defend.md)."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from samelib.service.batching import THREAD

STOP_SECONDS = 30  # in which accepted requests are answered when the service stops
FAREWELL_SECONDS = 1  # between the signal and the stop, in which answers end their connections
IDLE_SECONDS = 60  # of silence between two requests of a connection: puzzles take longer than uvicorn's 5


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


class Server(uvicorn.Server):
    """Tells clients to close their connections before it stops to listen: one that asks again meanwhile would find its
    connection cut."""

    def handle_exit(self, sig: int, frame) -> None:
        if self.config.app.state.stopping:  # asked twice: at once
            return super().handle_exit(sig, frame)
        self.config.app.state.stopping = True
        threading.Timer(FAREWELL_SECONDS, super().handle_exit, (sig, frame)).start()


def make_server(app: Starlette) -> Server:
    """The server of an app made by `create_app`, with its limits. It writes no access log: paths come from clients."""
    config = uvicorn.Config(
        app,
        http="h11",  # refuses headers beyond 64 KiB
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    server = Server(config)
    app.state.stopping = False
    app.state.connections = (
        server.server_state.connections
    )  # BodyLimits counts them: what uvicorn refuses no metric sees
    return server


def serve(app: Starlette, bound: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then answers what it accepted and exits with 0. The process should be its own.

    A model that never answers does not hold up the stop: its request has got 504 by then.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every character that a client got wrong
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # uvicorn raises the signal once more after its stop
    try:
        make_server(app).run(sockets=[bound])
    finally:
        if any(thread.name.startswith(THREAD) for thread in threading.enumerate()):  # Python would wait for it for ever
            sys.stdout.flush()
            os._exit(0)


@contextmanager
def running(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
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
