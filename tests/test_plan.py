import pytest

from reproduction.author_code import ALL_FAULTS, FAULTS
from reproduction.plan import (
    BARGAIN,
    BITS,
    HEADLINES,
    KNOWING,
    NEAREST_JBDA,
    OUTLIERS,
    SCALES,
    TARGETS,
    VARIANTS,
    Cell,
    DetectorVariant,
    cells_of,
    check_names,
    preset_of,
)
from reproduction.rows import as_frame


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_cells_of_its_own_names(target):
    group = "shapes" if target == "table2" else "glyphs"
    cells = cells_of(group, "smoke", [0, 1], [target])
    assert len({str(cell) for cell in cells}) == len(cells) == 2 * len([c for c in cells if c.seed == 0]) > 0


def test_all_is_every_target_of_the_group_once():
    everything = cells_of("glyphs", "lecture", [0], ["all"])
    assert len({str(cell) for cell in everything}) == len(everything)
    for target in set(TARGETS) - {"table2"}:
        assert set(cells_of("glyphs", "lecture", [0], [target])) <= set(everything)
    assert {cell.budget for cell in everything} == {0, 1_000, 2_000, 4_000, 200_000}


def test_a_detectors_cells_lie_together():
    """So that nothing is trained, or read from the disk, twice."""
    keys = [(cell.seed, cell.detector) for cell in cells_of("glyphs", "smoke", [0, 1], ["all"])]
    assert sum(a != b for a, b in zip(keys, keys[1:], strict=False)) == len(set(keys)) - 1


def test_the_curve_comes_first():
    """It watches the training of the autoencoder that the other cells then read from the store."""
    assert cells_of("glyphs", "paper", [0], ["all"])[0].experiment == "curve"
    assert SCALES["paper"].curve_train is None


def test_the_audit_has_each_fault_alone_and_all_together():
    faults = {cell.detector.fault for cell in cells_of("glyphs", "smoke", [0], ["audit"])}
    assert faults == {"none", ALL_FAULTS, *FAULTS}


def test_the_colour_groups_compare_both_stems():
    detectors = {str(cell.detector) for cell in cells_of("shapes", "smoke", [0], ["table3"])}
    assert {"victim, resnet18", "victim, resnet18-imagenet"} < detectors
    assert not any(cell.detector.architecture for cell in cells_of("glyphs", "smoke", [0], ["table3"]))


@pytest.mark.parametrize(
    ("group", "tier", "target", "words"),
    [
        (
            "letters",
            "smoke",
            "table1",
            "unknown group 'letters'; the grid knows glyphs, glyphs-matched, shapes, mnist, cifar10",
        ),
        ("glyphs", "huge", "table1", "unknown tier 'huge'; known: smoke, lecture, paper"),
        ("glyphs", "smoke", "table9", "unknown table or figure 'table9'; known: table1, .*, all"),
        ("glyphs", "smoke", "table2", "table2 is a table of --data cifar10 or shapes; for glyphs take table1"),
        ("cifar10", "smoke", "table1", "for cifar10 take table2"),
    ],
)
def test_unknown_names_are_refused(group, tier, target, words):
    with pytest.raises(ValueError, match=words):
        check_names(group, tier, [target])


@pytest.mark.parametrize("tier", SCALES)
def test_widths_of_the_embedding_include_the_tiers_own(tier):
    mae = preset_of("glyphs", tier).same.mae
    assert mae.width in SCALES[tier].widths and all(width % mae.heads == 0 for width in SCALES[tier].widths)


def test_a_cell_can_be_read_from_its_row():
    """Nothing is packed into a name: a row's fields are the cell's."""
    detector = DetectorVariant(scoring="mask 0", fault="KL deviation")
    cell = Cell("detection", "glyphs", "smoke", 3, detector, NEAREST_JBDA, 500)
    assert str(cell) == "glyphs smoke, seed 3: same, mask 0, KL deviation / jbda, direction -, step 0.2, 500 queries"
    row = as_frame([{"cell": str(cell)} | cell.fields()]).iloc[0]
    for name, value in (detector._asdict() | NEAREST_JBDA._asdict() | {"seed": 3, "budget": 500}).items():
        assert row[name] == value or value is None


def test_variants_have_labels_of_their_own():
    assert len({str(variant) for variant in VARIANTS}) == len(VARIANTS) and set(HEADLINES) < set(VARIANTS)
    knowing = {str(variant) for variant in (*KNOWING, BITS, BARGAIN)}
    assert len(knowing) == len(KNOWING) + 2 and "knockoff, adaptive, 20 clusters, paid by bits" in knowing
    assert str(NEAREST_JBDA) == "jbda, direction -, step 0.2"
    assert NEAREST_JBDA.options == {"step": 0.2, "direction": "-", "clip": True}


@pytest.mark.parametrize(("group", "asked"), [("mnist", True), ("shapes", False)])
def test_no_more_outliers_are_asked_than_there_are(group, asked):
    cells = cells_of(group, "lecture", [0], ["views"])
    assert any(cell.attack == OUTLIERS for cell in cells) == asked
