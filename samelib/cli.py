"""The command line: samelib data | fit | score | attack | serve | reproduce | cache."""

import argparse
import sys
import warnings

from samelib import __version__, commands
from samelib.artifacts import ArtifactError
from samelib.attacks.jbda import DIRECTIONS
from samelib.attacks.knockoff import REWARDS
from samelib.data.groups import SIZES
from samelib.data.image_set import OutOfRangeWarning
from samelib.data.real import DataError, cifar100_superclasses
from samelib.experiments import grid
from samelib.experiments.cells import TARGETS
from samelib.experiments.run import ATTACKS

GROUP_HELP = "glyphs or shapes (embedded, no download), mnist, cifar10, or path:FOLDER / path:FILE.npz of your own"
TIER_HELP = "how much data and training: smoke (seconds), lecture (minutes on two cores), paper (a GPU)"


def superclasses(text: str) -> list[int]:
    """The command line's "0,0,1,..." or "cifar100"."""
    return cifar100_superclasses() if text == "cifar100" else [int(number) for number in text.split(",")]


ATTACK_OPTIONS = {
    "labels": {"choices": ("soft", "hard"), "help": "train on probabilities (default) or on the class named alone"},
    "reward": {"choices": (*REWARDS, "all"), "help": "what the bandit is paid for (default: all)"},
    "superclasses": {"type": superclasses, "metavar": "N,N,...", "help": "for each proxy class its superclass, or cifar100: a tree of bandits"},
    "step": {"type": float, "help": "how far a pixel moves in a round (default: 0.1)"},
    "step_range": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"),
                   "help": "range of pixel values in which the step is meant (default: -1 1)"},
    "direction": {"choices": DIRECTIONS, "help": "raise (+, default) or lower (-) the victim's class, or raise another"},
    "reservoir": {"type": int, "help": "the most new images a round (default: no limit)"},
    "epsilon": {"type": float, "help": "length of a forward difference"},
    "directions": {"type": int, "help": "random directions of a gradient estimate"},
    "student_steps": {"type": int, "help": "steps of the substitute for each of the generator"},
}  # fmt: skip
OPTIONS_OF = {
    "noise": ("labels",),
    "knockoff": ("labels",),
    "adaptive-knockoff": ("labels", "reward", "superclasses"),
    "jbda": ("labels", "step", "step_range", "direction", "reservoir"),
    "dfme": ("epsilon", "directions", "student_steps"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="samelib",
        description="Detects model extraction queries with SAME: reconstruction error plus deviation of predictions.",
        epilog="A first round: samelib fit my-detector --tier smoke; samelib score my-detector FOLDER_OF_IMAGES",
    )
    top.add_argument("--version", action="version", version=f"samelib {__version__}")
    subcommands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run, help, description, **more):
        made = subcommands.add_parser(run.__name__, help=help, description=description, **more)
        made.set_defaults(run=run)
        return made

    def group_options(made):
        made.add_argument("--data", default="glyphs", help=GROUP_HELP + " (default: glyphs)")
        made.add_argument("--tier", choices=SIZES, default="lecture", help=TIER_HELP + " (default: lecture)")
        made.add_argument("--proxy", help="path:... to use as the attacker's proxy set")
        made.add_argument("--outliers", help="path:... to use as the baselines' outlier set")

    made = command(
        commands.data, "show a group of data sets", "Loads a group, shows its six disjoint sets and what they hold."
    )
    group_options(made)
    made.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet of all six sets")

    made = command(commands.fit, "train victim and detector, save the detector",
                   "Trains a victim, the masked autoencoder and the auxiliary model (or takes them from the cache), "
                   "calibrates the threshold on held-out benign images and saves all of it as one folder.")  # fmt: skip
    made.add_argument("detector", metavar="DETECTOR", help="the folder to write")
    group_options(made)
    made.add_argument("--seed", type=int, default=0, help="of weights, order and masks (default: 0)")
    made.add_argument("--protocol", choices=("fixed", "author_code"), default="fixed",
                      help="what the paper says, done soundly, or what its released code does (default: fixed)")  # fmt: skip
    made.add_argument("--fpr", type=float, default=0.05, help="share of benign queries to flag (default: 0.05)")

    made = command(commands.score, "score images with a saved detector",
                   "Writes one CSV row an image: score (higher = more suspicious), its two terms, the conformal p-value "
                   "(small = few benign images look as strange) and whether it is flagged.")  # fmt: skip
    made.add_argument("detector", metavar="DETECTOR", help="a folder written by samelib fit")
    made.add_argument("images", metavar="IMAGES", help="an image, a folder of images (resized to fit), or an .npz file")
    made.add_argument("--output", metavar="FILE.csv", help="where to write the table (default: standard output)")

    made = command(commands.attack, "steal a model, save the query log and the copy",
                   "Runs an attack against a saved victim or a group's own, and writes a folder: queries.npz (images, "
                   "answers, and scores where a detector watched), and the substitute as safetensors. The attacker's "
                   "proxy and seed images are those of the group.",
                   epilog="samelib attack jbda --help shows the options of one attack")  # fmt: skip
    attacks = made.add_subparsers(dest="attack", required=True, metavar="ATTACK")
    for name, kind in ATTACKS.items():
        first_line = kind.__doc__.splitlines()[0]
        made = attacks.add_parser(name, help=first_line, description=first_line)
        made.add_argument("output", metavar="FOLDER", help="the folder to write")
        group_options(made)
        made.add_argument("--victim", metavar="FOLDER", help="a detector's folder (it then watches), or a substitute's")
        made.add_argument("--budget", type=int, help="queries to spend (default: the tier's larger budget)")
        made.add_argument("--seed", type=int, default=0, help="of queries and weights (default: 0)")
        made.set_defaults(options=OPTIONS_OF[name])
        for option in OPTIONS_OF[name]:
            made.add_argument("--" + option.replace("_", "-"), **ATTACK_OPTIONS[option])

    made = command(commands.serve, "put a saved detector in front of its victim, as an HTTP service",
                   "Serves POST /v1/predict, /docs, /healthz and /metrics until it is stopped; what it accepted by then is "
                   "answered. Needs pip install 'samelib[serve]'. With proof of work, SAMELIB_SECRET signs the challenges: "
                   "16 characters or more, to be kept across restarts together with --stamps.")  # fmt: skip
    made.add_argument("detector", metavar="DETECTOR", help="a folder written by samelib fit")
    made.add_argument("--victim", metavar="FOLDER", help="a classifier to serve instead of the one saved along")
    made.add_argument("--response", choices=commands.RESPONSES, default="reject",
                      help="to strange queries: refuse them (default), ask for proof of work, only count them (watch), or "
                           "nothing, without the detector (off)")  # fmt: skip
    made.add_argument("--fpr", type=float, help="share of benign queries to refuse (default: the detector's own)")
    made.add_argument("--base-bits", type=int, default=10, help="2^bits hashes for an ordinary query (default: 10)")
    made.add_argument("--most-bits", type=int, default=10, help="how many come on top for a strange one (default: 10)")
    made.add_argument("--stamps", metavar="FILE.sqlite", help="remembers spent stamps across restarts")
    made.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    made.add_argument("--port", type=int, default=8000, help="(default: 8000; 0 takes a free one)")

    made = command(commands.reproduce, "measure and draw the paper's tables and figures",
                   "Measures what is missing for these tables and figures, a cell at a time (it may be killed and run "
                   "again at any point), adds the rows to results/, and draws all from the rows.",
                   epilog="; ".join(f"{name}: {target.what}" for name, target in TARGETS.items()))  # fmt: skip
    made.add_argument("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    made.add_argument("--data", default="mnist", help="mnist (default), cifar10, glyphs or shapes")
    made.add_argument("--tier", default="lecture", help=TIER_HELP + " (default: lecture)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    made.add_argument("--results", metavar="FOLDER", help="where the rows are (default: results/ of the checkout)")
    made.add_argument("--output", metavar="FOLDER", default="reproduced", help="where to draw (default: reproduced/)")
    made.add_argument("--workers", choices=grid.WORKERS, default="serial",
                      help="one process, or a Ray cluster (pip install 'samelib[scale]')")  # fmt: skip
    made.add_argument("--dry-run", action="store_true", help="only say what would be measured, and for how long")

    made = command(commands.cache, "list or clear the trained models",
                   "Trained models are kept under the hash of everything that decides them; SAMELIB_CACHE says where.")  # fmt: skip
    made.add_argument("--clear", action="store_true", help="delete all of them")
    return top


def main(words: list[str] | None = None) -> None:
    arguments = parser().parse_args(words)
    warnings.simplefilter("once", OutOfRangeWarning)
    try:
        arguments.run(arguments)
    except (DataError, ArtifactError, grid.CellError, ArithmeticError, ValueError, TypeError, OSError) as error:
        sys.exit(f"samelib: {error}")
    except KeyboardInterrupt:
        sys.exit("samelib: stopped; the training of a victim or detector goes on from its last checkpoint")


if __name__ == "__main__":
    main()
