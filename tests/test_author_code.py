"""Each fault of the released code does what it says, and nothing else."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import TINY_SAME

from reproduction import author_code
from reproduction.author_code import ALL_FAULTS, FAULTS, AuthorCodeDetector, faults_of, kl_deviation
from samelib.data.image_set import OutOfRangeWarning, quantise
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim, build_classifier
from samelib.presets import scoring_variants

MASK_0 = scoring_variants(TINY_SAME)["mask 0"]


@pytest.fixture
def fitted(group, victim, store):
    """A function: the detector with that fault."""
    return lambda fault: AuthorCodeDetector(MASK_0, fault).fit(
        group.victim_train, group.calibration, victim, store=store
    )


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="fault must be none, trained on labels, .* or all of them, got 'slow'"):
        AuthorCodeDetector(MASK_0, "slow")
    assert faults_of("none") == () and faults_of(ALL_FAULTS) == FAULTS


def test_without_a_fault_it_is_same(fitted, group, victim, store):
    sound = SameDetector(MASK_0).fit(group.victim_train, group.calibration, victim, store=store)
    x = group.proxy.pixels()[:20]
    for fault in ("none", author_code.INTERPOLATED):
        assert torch.equal(fitted(fault).score(x), sound.score(x))


def test_labels_and_masks_train_another_auxiliary_model(fitted):
    cards = {fault: fitted(fault).cards for fault in ("none", author_code.LABELS, author_code.MASKED, ALL_FAULTS)}
    specs = {fault: card["auxiliary"]["spec"] for fault, card in cards.items()}
    differ = {fault: {name for name in spec if spec[name] != specs["none"][name]} for fault, spec in specs.items()}
    assert differ["none"] == set()
    assert differ[author_code.LABELS] == {"target"} and differ[author_code.MASKED] == {"ratio"}
    assert differ[ALL_FAULTS] == {"target", "ratio", "mae"}, "the divided loss trains another autoencoder"
    assert cards[ALL_FAULTS]["mae"]["spec"]["loss_factor"] == pytest.approx(1 / 0.75)


def test_trained_on_labels_is_cross_entropy():
    detector, logits = AuthorCodeDetector(MASK_0, author_code.LABELS), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    loss = detector._auxiliary_loss(logits, torch.full((2, 2), 0.5), torch.tensor([0, 1]))
    assert float(loss) == pytest.approx(float(torch.log1p(torch.exp(torch.tensor(-2.0)))))


def test_kl_deviation_by_hand(fitted, group):
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert kl_deviation(p, q).tolist() == pytest.approx([0.0, float(torch.log(torch.tensor(2.0))) / 2])
    x = group.proxy.pixels()[:20]
    sound, faulty = fitted("none").terms(x), fitted(author_code.KL).terms(x)
    assert torch.equal(sound.reconstruction, faulty.reconstruction)
    assert not torch.allclose(sound.deviation, faulty.deviation)


def test_raw_queries_are_scored_as_sent_and_answered_as_received(fitted, group):
    raw = group.proxy.pixels()[:10] * 1.5
    faulty, sound = fitted(author_code.RAW_QUERIES), fitted("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRangeWarning)
        r = faulty.terms(raw).reconstruction
    assert (r > sound.terms(quantise(raw)).reconstruction).all(), "what lies outside [-1, 1] counts"
    assert torch.equal(faulty.score(quantise(raw)), sound.score(quantise(raw)))


def test_with_batch_statistics_a_score_depends_on_its_batch(group, store, tmp_path):
    """Conv3 has no BatchNorm: a ResNet has."""
    model = build_classifier("resnet18-imagenet", group.image_shape, group.classes)
    victim = Victim.of(model, group.image_shape, group.classes, "resnet18-imagenet")
    settings = replace(MASK_0, auxiliary="resnet18-imagenet", auxiliary_images=32)
    x = group.proxy.pixels()[:16]
    for fault, alike in (("none", True), (author_code.BATCH_STATISTICS, False)):
        detector = AuthorCodeDetector(settings, fault)
        detector.fit(group.victim_train[:64], group.calibration[:60], victim, store=store)
        before = {name: value.clone() for name, value in detector.auxiliary.state_dict().items()}
        whole, halves = detector.score(x), torch.cat([detector.score(part) for part in x.split(8)])
        assert torch.allclose(whole, halves, rtol=1e-3, atol=1e-3) == alike
        assert all(torch.equal(before[name], value) for name, value in detector.auxiliary.state_dict().items())


def test_the_raw_scale_weighs_the_terms_as_they_are(fitted, group):
    detector, x = fitted(author_code.RAW_SCALE), group.proxy.pixels()[:10]
    terms = detector.terms(x)
    assert torch.allclose(detector.score(x), 0.99 * terms.reconstruction + 0.01 * terms.deviation)
