"""The commands of a service: samelib serve | listen | accounts."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import click

from samelib.accounts import STREAMS, AccountBook
from samelib.detectors import load_detector
from samelib.detectors.base import check_fpr
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim
from samelib.responses import BanAccount, ProofOfWork, Reject
from samelib.store import load_card
from samelib.training import best_device

RESPONSE_OPTIONS = {  # the others are refused: who gives one expects it to matter
    "reject": {"fpr"},
    "proof-of-work": {"base_bits", "most_bits", "stamps"},
    "ban": {"delta", "accounts"},
    "watch": {"delta", "accounts", "share"},
    "off": set(),
}
TENSOR_OPTIONS = {"image", "pixels", "probabilities", "logits"}
PLACE_OPTIONS = {"a model of one's own": {"victim"}, "--upstream": TENSOR_OPTIONS | {"fail_open"}}

host_option = click.option("--host", default="127.0.0.1", help="The default is for this machine alone.")
port_option = click.option("--port", default=8000, help="0 takes a free one.")


def tensor_options(command: Callable) -> Callable:
    """Which tensors of another server are images and probabilities."""
    for option in (
        click.option("--logits", is_flag=True, default=None, help="That output needs a softmax yet."),
        click.option("--probabilities", metavar="NAME", help="The output with the probabilities; by default the only one "
                     "of floats with two dimensions."),
        click.option("--pixels", type=(float, float), metavar="BLACK WHITE", help="Values of black and white in tensors of "
                     "floats; by default 0 and 1. Integers are 0 to 255."),
        click.option("--image", metavar="NAME", help="What the input with the images, the only one of numbers, must be called."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("detector", type=Path)
@click.option("--victim", type=Path, metavar="FOLDER", help="A classifier to serve instead of the one saved along.")
@click.option("--response", type=click.Choice(list(RESPONSE_OPTIONS)), default="reject",
              help="To strange queries: refuse them, ask for proof of work, ban accounts that send many, only count "
              "them, or do not even look.")  # fmt: skip
@click.option("--fpr", type=float, help="reject: share of benign queries to refuse; by default the detector's own.")
@click.option("--base-bits", type=int, help="proof-of-work: 2^bits hashes for an ordinary query; by default 10.")
@click.option("--most-bits", type=int, help="proof-of-work: how many come on top for a strange one; by default 10.")
@click.option("--stamps", metavar="FILE.sqlite", help="proof-of-work: remembers spent stamps across restarts.")
@click.option("--delta", type=float, help="ban: false bans, as a share of honest accounts; by default 0.001.")
@click.option("--accounts", metavar="FILE.sqlite", help="ban: remembers evidence and bans across restarts. watch: who "
              "would have been banned.")  # fmt: skip
@click.option("--share", type=float, help="watch: of the queries that the detector looks at; by default 1.")
@click.option("--upstream", metavar="URL", help="Pass queries on to this model of a server that speaks the Open Inference "
              "Protocol, http://HOST:PORT/v2/models/NAME. The options after this one are about it.")  # fmt: skip
@tensor_options
@click.option("--fail-open", is_flag=True, default=None, help="Answers pass where the detector fails or is late; by "
              "default they do not.")  # fmt: skip
@host_option
@port_option
def serve(detector: Path, response: str, upstream: str | None, host: str, port: int, **options) -> None:
    """Serve a victim over HTTP, its detector in front.

    DETECTOR is a folder written by samelib fit. Serves predictions, /docs, /v2/health/ready and /metrics until it is
    stopped; what it accepted by then is answered. With --upstream another server predicts, and metrics are under
    /samelib/metrics. Needs pip install 'samelib[serve]'. SAMELIB_SECRET signs the challenges of a proof of work, and
    hashes the API keys before bans are kept: 16 characters or more, to be kept across restarts together with --stamps or
    --accounts.
    """
    place = "--upstream" if upstream else "a model of one's own"
    given = {name: options.pop(name) for name in set().union(*PLACE_OPTIONS.values())}
    place, options = used_options(place, PLACE_OPTIONS, given), used_options(response, RESPONSE_OPTIONS, options)
    if upstream and response == "off":
        raise ValueError("with --response off there is nothing to do before --upstream; choose watch, to count only")
    with extra("serve"):
        from samelib.service import app, proxy, server
    with server.bound_socket(host, port) as bound:
        same = elsewhere(detector) if upstream else saved(detector, place.get("victim"))
        with new_files(options.get("stamps"), options.get("accounts")):
            decision, office = decided(response, options, same)
            shared = {"office": office, "share": options.get("share", 1.0)}
            if upstream:
                shared |= read_tensors(place, same) | {"fail_open": place.get("fail_open", False)}
                service = proxy.create_proxy(upstream, same, decision, **shared)
            else:
                service = app.create_app(same.victim, None if response == "off" else same, decision, **shared)
        bound.listen()  # who reads the next line can connect
        print(f"{server.url_of(bound)}{'/v2' if upstream else '/docs'}  response: {decision or response}", flush=True)
        server.serve(service, bound)


@click.command()
@click.argument("detector", type=Path)
@tensor_options
@click.option("--share", type=float, default=1.0, help="Of the queries that the detector looks at.")
@host_option
@port_option
def listen(detector: Path, share: float, host: str, port: int, **tensors) -> None:
    """Listen to what another server is asked and answers.

    DETECTOR is a folder written by samelib fit. Takes the CloudEvents of KServe's payload logger (mode: all), and answers
    nobody: what it sees stands under /metrics. Needs pip install 'samelib[serve]'.
    """
    with extra("listen"):
        from samelib.service import events, server
    with server.bound_socket(host, port) as bound:
        same = elsewhere(detector)
        tensors = {name: value for name, value in tensors.items() if value is not None}
        service = events.create_listener(same, **read_tensors(tensors, same), share=share)
        bound.listen()
        print(f"{server.url_of(bound)}/metrics", flush=True)
        server.serve(service, bound)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--lift", metavar="HASHPREFIX", help="Lift the ban of the account whose hash begins so.")
def accounts(file: str, lift: str | None) -> None:
    """List accounts and lift bans.

    FILE is that of samelib serve --response ban --accounts FILE, which may be running. One line an account, banned ones
    first: the beginning of its hash, its queries, the natural logarithm of its wealth in each stream of evidence (0
    where there is none; a ban comes when the mean of the wealths reaches 1 / delta), and since when it is banned. An
    account whose ban is lifted starts anew.
    """
    book = AccountBook(file)
    if lift is not None:
        print(f"account {book.lift(lift).label}: its ban is lifted, and its wealth is 1 again")
        return
    print(f"{'account':12} {'queries':>9} " + " ".join(f"{stream:>12}" for stream in STREAMS) + "  banned since")
    for account in book.entries():
        wealths = " ".join(f"{account.wealth[stream].log_wealth:12.2f}" for stream in STREAMS)
        since = "" if account.banned is None else f"  {datetime.fromtimestamp(account.banned):%Y-%m-%d %H:%M:%S}"
        print(f"{account.label:12} {account.queries:9,} {wealths}{since}")


def used_options(choice: str, allowed: dict[str, set[str]], options: dict) -> dict:
    """The options that were given; ValueError where the choice would ignore one."""
    given = {name: value for name, value in options.items() if value is not None}
    if ignored := ", ".join(f"--{name.replace('_', '-')}" for name in given.keys() - allowed[choice]):
        raise ValueError(f"{choice} ignores {ignored}: leave it out, or choose another of {', '.join(allowed)}")
    return given


@contextmanager
def extra(command: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"samelib {command} needs {error.name}: pip install 'samelib[serve]'") from error


def saved(folder: Path, victim: Path | None) -> SameDetector:
    """The detector in a folder, with the victim that was saved along, or the one in another folder."""
    device = best_device()
    return load_detector(folder, Victim.load(victim, device) if victim else None, device)


def elsewhere(folder: Path) -> SameDetector:
    """The detector in a folder, beside a model that another server asks."""
    card = load_card(folder)
    victim = Victim.elsewhere(card["image_shape"], card["classes"]) if "classes" in card else None
    return load_detector(folder, victim, best_device())


def read_tensors(options: dict, detector: SameDetector) -> dict:
    """How to find images and probabilities in the messages of another server."""
    from samelib.service.tensors import InferAnswers, InferImages

    pixels = options.get("pixels", (0.0, 1.0))
    return {
        "decode": InferImages(detector.image_shape, options.get("image"), pixels),
        "answers": InferAnswers(options.get("probabilities"), options.get("logits", False)),
    }


def decided(response: str, options: dict, detector: SameDetector) -> tuple:
    """What is done, None where it is only counted; and who signs and takes the stamps of a proof of work."""
    chosen = {name: value for name, value in options.items() if name not in ("stamps", "accounts", "share")}
    if response == "reject":
        decision = Reject(**{"fpr": detector.fpr} | chosen)
        check_fpr(decision.fpr, len(detector.calibration_scores))  # below every p-value it would refuse nobody
        return decision, None
    if response == "proof-of-work":
        return ProofOfWork(**chosen), stamp_office(options.get("stamps"))
    if response == "ban" or "accounts" in options or chosen:
        file = options.get("accounts")
        book = AccountBook(file, lasting_secret("--accounts", file))
        return BanAccount(**chosen, accounts=book, enforce=response == "ban"), None
    return None, None


def stamp_office(stamps: str | None):
    """The office that the environment's secret and the file of spent stamps make; without both, one for this run."""
    from samelib.service.stamps import SpentStamps, StampOffice

    return StampOffice(lasting_secret("--stamps", stamps) or secrets.token_bytes(32), spent=SpentStamps(stamps))


def lasting_secret(option: str, file: str | None) -> bytes | None:
    """The environment's secret; ValueError where it or the file that goes with it is missing."""
    secret = os.environ.get("SAMELIB_SECRET")
    if (secret is None) != (file is None):
        raise ValueError(
            f"SAMELIB_SECRET and {option} FILE go together: with a lasting secret and no file, a restart would forget "
            "what was spent or banned; a file without the secret remembers what nobody can sign or find any more"
        )
    return None if secret is None else secret.encode()


@contextmanager
def new_files(*paths: str | None) -> Iterator[None]:
    """Databases that the block makes are deleted where it raises: a refused start leaves nothing behind."""
    new = [path for path in paths if path and not Path(path).exists()]
    try:
        yield
    except BaseException:
        for path in new:
            for suffix in ("", "-wal", "-shm"):  # SQLite's
                Path(path + suffix).unlink(missing_ok=True)
        raise
