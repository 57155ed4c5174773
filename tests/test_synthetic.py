"""The embedded data sets: the same bytes everywhere, real classes, and what tells proxy from victim.

On glyphs a sharper edge does; on glyphs-matched nothing does that fits into a line.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from samelib.data import synthetic
from samelib.data.groups import load_group
from samelib.data.image_set import to_float
from samelib.data.synthetic import GLYPHS, PARTS, glyphs, shapes
from samelib.detectors.controls import largest_difference, log_variance, squared_laplacian

DRAW = {"glyphs": glyphs, "shapes": shapes}
EVERY = [("glyphs", part) for part in GLYPHS] + [("shapes", part) for part in PARTS]
PROXIES = [("glyphs", "proxy"), ("glyphs", "matched"), ("shapes", "proxy")]
FINGERPRINTS = {  # of 64 images, seed 0
    ("glyphs", "victim"): "95c7f88a278f7c1b4886b6d6e2345ae2e8be17cbeccb35acc00e53ddd55d4292",
    ("glyphs", "proxy"): "dea6443da33d78744a3eff2dcae035eed9a3ff0d8e4d42c21b1ae92a3157a7ce",
    ("glyphs", "outliers"): "58e04617229c90bc005ca7a9220872c9778c3b6698e49d5edf650eed9d5c3846",
    ("glyphs", "matched"): "f6a4ee609823fbc5cca8bc0a2fa6e7fe2fb1fbcdcf7adde75ff8fe89494f9915",
    ("shapes", "victim"): "562cee2d506b99a75210b23e9a32e2d519e769d6f649c8de5b9bd42b7ed41ffa",
    ("shapes", "proxy"): "faa8347b960fb0072073d65696c1ef4441714ade7fefa4550efd936cb040ef3e",
    ("shapes", "outliers"): "0cbaad638f3c6e14f6a36d73b4440bbeee6d946748c5319993eff0604a43e0ff",
}


@pytest.fixture(scope="module")
def sets():
    """2,000 images of every part of both data sets."""
    return {(name, part): DRAW[name](part, 2000) for name, part in EVERY}


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_bytes_are_pinned(name, part):
    assert DRAW[name](part, 64).fingerprint == FINGERPRINTS[name, part]


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_seed_decides_every_image(name, part):
    draw = DRAW[name]
    first, again, other = draw(part, 64, seed=3), draw(part, 64, seed=3), draw(part, 64, seed=4)
    assert first.fingerprint == again.fingerprint
    assert (first.images != other.images).flatten(1).any(1).all()


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_a_longer_set_begins_with_the_shorter(name, part, sets):
    short, long = DRAW[name](part, 77), sets[name, part]
    assert torch.equal(short.images, long.images[:77]) and torch.equal(short.labels, long.labels[:77])


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_form(name, part, sets):
    drawn = sets[name, part]
    assert drawn.image_shape == {"glyphs": (1, 28, 28), "shapes": (3, 32, 32)}[name]
    assert len(drawn) == 2000 and drawn.name == f"{name} {part}"
    assert len(drawn.classes) >= (4 if (name, part) == ("shapes", "outliers") else 10)
    per_class = torch.bincount(drawn.labels, minlength=len(drawn.classes))
    assert per_class.max() - per_class.min() <= 1
    assert not torch.equal(drawn.labels[:10], torch.arange(10)), "labels are not shuffled"
    blank = drawn.images.flatten(1).amax(1) - drawn.images.flatten(1).amin(1) < 20
    assert not blank.any(), f"{int(blank.sum())} blank images"


@pytest.mark.parametrize("name", DRAW)
def test_no_image_twice_within_or_across_parts(name, sets):
    images = torch.cat([drawn.images for (of, _), drawn in sets.items() if of == name]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_victim_and_proxy_share_nothing_they_are_drawn_from():
    for proxy in ("proxy", "matched"):
        assert not set(GLYPHS["victim"].fonts) & set(GLYPHS[proxy].fonts)
        assert GLYPHS["victim"].characters == GLYPHS[proxy].characters
    assert not set(GLYPHS["outliers"].characters) & set(synthetic.DIGITS)
    assert not set(synthetic.SHAPES["victim"].characters) & set(synthetic.SHAPES["proxy"].characters)
    assert not set(synthetic.PALETTES["victim"]) & set(synthetic.PALETTES["proxy"])


def test_every_font_holds_its_characters():
    """A missing character would be drawn as the font's empty box: the same picture as that of another missing one."""
    for part in [*GLYPHS.values(), *synthetic.SHAPES.values()]:
        for font in part.fonts:
            missing = synthetic.render(font, "\U0010fffe").tobytes()
            pictures = [synthetic.render(font, character).tobytes() for character in part.characters]
            assert missing not in pictures, font
            assert len(set(pictures)) == len(part.classes) == len(part.characters), font


def test_the_matched_group_is_glyphs_but_for_its_proxy():
    ours, matched = (load_group(name, "smoke").sets() for name in ("glyphs", "glyphs-matched"))
    other = {name for name in ours if ours[name].fingerprint != matched[name].fingerprint}
    assert other == {"proxy"} and matched["proxy"].name == "glyphs matched"
    pipeline = [(part.ramp, part.bend) for part in (GLYPHS["victim"], GLYPHS["matched"])]
    assert pipeline[0] == pipeline[1]


# ---- how near victim and proxy are ----


def one_way_or_the_other(victim: np.ndarray, proxy: np.ndarray) -> float:
    """AUROC of one number a picture, whichever side has the larger ones."""
    auroc = roc_auc_score(np.repeat([0, 1], [len(victim), len(proxy)]), np.concatenate([victim, proxy]))
    return max(auroc, 1 - auroc)


def extent(on: np.ndarray) -> np.ndarray:
    """bool [n, length] -> [n]: from the first True to the last."""
    return on.shape[1] - on.argmax(1) - on[:, ::-1].argmax(1)


def coarse_statistics(images: torch.Tensor) -> dict[str, np.ndarray]:
    """uint8 [n, C, H, W] -> one number a picture and channel, by name."""
    values = {}
    for channel in range(images.shape[1]):
        x = images[:, channel].numpy().astype(np.float64)
        ink, position = x > 127, np.arange(x.shape[1])
        of_channel = {
            "mean": x.mean((1, 2)),
            "std": x.std((1, 2)),
            "maximum": x.max((1, 2)),
            "ink": ink.mean((1, 2)),
            "horizontal gradient": np.abs(np.diff(x, axis=2)).mean((1, 2)),
            "vertical gradient": np.abs(np.diff(x, axis=1)).mean((1, 2)),
            "row": x.sum(2) @ position / x.sum((1, 2)),
            "column": x.sum(1) @ position / x.sum((1, 2)),
            "height": extent(ink.any(2)),
            "width": extent(ink.any(1)),
        }
        values |= {f"{statistic} of channel {channel}": number for statistic, number in of_channel.items()}
    return values


def fine_statistics(images: torch.Tensor) -> dict[str, np.ndarray]:
    """uint8 [n, C, H, W] -> one number a picture, by name: of its edges and textures."""
    x = to_float(images)
    variance = log_variance(x, patch=4)
    return {
        "largest difference": largest_difference(x).numpy(),
        "Laplacian": squared_laplacian(x).numpy(),
        "log local variance": variance.mean(1).numpy(),
        "spread of log local variance": variance.std(1).numpy(),
    }


@pytest.fixture(scope="module")
def aurocs(sets) -> dict[tuple[str, str], dict[str, float]]:
    """Of each statistic, for each proxy against its victim."""

    def of(name: str, part: str) -> dict[str, float]:
        victim, proxy = (
            coarse_statistics(drawn) | fine_statistics(drawn)
            for drawn in (sets[name, "victim"].images, sets[name, part].images)
        )
        return {statistic: one_way_or_the_other(victim[statistic], proxy[statistic]) for statistic in victim}

    return {pair: of(*pair) for pair in PROXIES}


@pytest.mark.parametrize(("name", "part"), [("glyphs", "matched"), ("shapes", "proxy")])
def test_no_single_statistic_tells_victim_from_proxy(name, part, aurocs):
    assert max(aurocs[name, part].values()) < 0.65, aurocs[name, part]


def test_of_glyphs_the_sharpness_of_edges_tells_the_proxy_from_the_victim(aurocs):
    """Their proxy is drawn crisper: whoever detects it may have detected the printer. Coarse statistics do not see it."""
    found = aurocs["glyphs", "proxy"]
    assert min(found["Laplacian"], found["largest difference"]) > 0.8
    assert max(value for statistic, value in found.items() if "channel" in statistic) < 0.65, found


@pytest.mark.parametrize(("name", "part"), PROXIES)
def test_no_single_pixel_tells_victim_from_proxy(name, part, sets):
    victim, proxy = (sets[name, of].images.flatten(1).numpy() for of in ("victim", part))
    worst = 0.5
    for v, p in zip(victim.T, proxy.T, strict=True):
        # AUROC by counting levels: how many victims lie below each level, ties counted half.
        counts = np.bincount(v, minlength=256)
        auroc = np.bincount(p, minlength=256) @ (np.cumsum(counts) - counts / 2) / (len(v) * len(p))
        worst = max(worst, auroc, 1 - auroc)
    assert worst < 0.75


# ---- and yet the problem is real: labels can be learned ----


def test_labels_can_be_learned(sets):
    train, test = sets["glyphs", "victim"], glyphs("victim", 500, seed=1)
    classifier = KNeighborsClassifier(3).fit(train.pixels().flatten(1), train.labels)
    assert classifier.score(test.pixels().flatten(1), test.labels) > 0.8
    assert classifier.score(test.pixels().flatten(1), test.labels.roll(1)) < 0.3, "any labels would have done"


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("part", ["train", "", None])
def test_unknown_part(name, part):
    with pytest.raises(ValueError, match=r"unknown part .* victim, proxy, outliers"):
        DRAW[name](part, 10)


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("count", [0, -5])
def test_count_below_one(name, count):
    with pytest.raises(ValueError, match=f"at least 1, got {count}"):
        DRAW[name]("victim", count)
