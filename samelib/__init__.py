"""samelib: model extraction attacks and their detection with SAME (arXiv 2312.10578)."""

__version__ = "0.1.0"

from samelib.attacks import (
    DFME,
    JBDA,
    AdaptiveKnockoff,
    AttackResult,
    Evasion,
    Knockoff,
    Mixing,
    Preprocessing,
    RoundRobin,
    SelfTraining,
    UniformNoise,
    expected_score,
    make_attack,
)
from samelib.data.groups import Group, load_group
from samelib.data.image_set import ImageSet
from samelib.detectors.base import Detector, DetectorEstimator
from samelib.detectors.controls import Control
from samelib.detectors.edm import EDM
from samelib.detectors.outlier_exposure import OutlierExposure
from samelib.detectors.posthoc import PostHoc
from samelib.detectors.prada import Prada
from samelib.detectors.same import SameDetector
from samelib.detectors.same_plus import SamePlus
from samelib.environment import check_environment
from samelib.gateway import BudgetExceeded, Defence, QueryGateway, Verdict
from samelib.metrics import accuracy, auroc, detection_metrics, fidelity
from samelib.models.classifiers import Victim
from samelib.models.mae import MaskedAutoencoder
from samelib.presets import evaluation, preset, train_victim
from samelib.responses import BanAccount, ProofOfWork, Reject
from samelib.store import ArtifactStore
from samelib.training import TrainSettings

__all__ = [
    "AdaptiveKnockoff",
    "ArtifactStore",
    "AttackResult",
    "BanAccount",
    "BudgetExceeded",
    "Control",
    "DFME",
    "Defence",
    "Detector",
    "DetectorEstimator",
    "EDM",
    "Evasion",
    "Group",
    "ImageSet",
    "JBDA",
    "Knockoff",
    "MaskedAutoencoder",
    "Mixing",
    "OutlierExposure",
    "PostHoc",
    "Prada",
    "Preprocessing",
    "ProofOfWork",
    "QueryGateway",
    "Reject",
    "RoundRobin",
    "SameDetector",
    "SamePlus",
    "SelfTraining",
    "TrainSettings",
    "UniformNoise",
    "Verdict",
    "Victim",
    "accuracy",
    "auroc",
    "check_environment",
    "detection_metrics",
    "evaluation",
    "expected_score",
    "fidelity",
    "load_group",
    "make_attack",
    "preset",
    "train_victim",
]
