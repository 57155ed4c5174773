"""`import samelib` is enough: every name of it has a docstring, the first program runs, and nothing heavy comes along."""

import inspect
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from conftest import TINY_SAME, TINY_TRAIN

import samelib


@pytest.mark.parametrize("name", samelib.__all__)
def test_every_name_is_there_and_documented(name):
    thing = getattr(samelib, name)
    assert thing.__module__.startswith("samelib.")
    assert len(inspect.cleandoc(thing.__doc__ or "").split()) >= 4, f"{name} has no docstring of its own"
    assert not thing.__doc__.startswith(f"{name}("), "that is what dataclass writes where there is none"


def test_the_first_program(group, monkeypatch):
    """The five lines of the design, on less data and with shorter trainings."""
    monkeypatch.setattr(samelib, "load_group", lambda name: group)
    settings = replace(samelib.preset("smoke", group.image_shape), victim_train=TINY_TRAIN, same=TINY_SAME)
    monkeypatch.setattr(sys.modules["samelib.presets"], "preset", lambda *_: settings)
    monkeypatch.setattr(sys.modules["samelib.detectors.same"], "preset", lambda *_: settings)

    group = samelib.load_group("glyphs")
    victim = samelib.train_victim(group)
    detector = samelib.SameDetector.preset("lecture", group.image_shape)
    detector = detector.fit(group.victim_train, group.calibration, victim)
    gateway = samelib.QueryGateway(victim, budget=100, detector=detector)
    result = samelib.Knockoff(group.proxy, settings=TINY_TRAIN).run(gateway)

    assert gateway.spent == result.queries == len(gateway.log.scores) == 100


def test_the_readme_needs_no_deeper_name():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    program = next(block for block in text.split("```python\n")[1:] if "samelib" in block).split("```")[0]
    assert "import samelib\n" in program and "from samelib." not in program


def test_nothing_heavy_comes_along():
    """It imports where none of these can be (scikit-learn takes pandas where it is)."""
    heavy = ("fastapi", "httpx", "uvicorn", "ray", "pandas", "click", "reproduction")
    check = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import samelib"
    subprocess.run([sys.executable, "-c", check], check=True)


# ---- check_environment ----


def test_the_environment_is_said(capsys):
    samelib.check_environment()
    assert f"samelib {samelib.__version__}, Python 3." in capsys.readouterr().out


def test_what_is_missing_is_named_with_the_command_that_mends_it(monkeypatch):
    needs = ["torch>=2.6", "nowhere-to-be-found>=1", "numpy>=99", "httpx>=0.27; extra == 'serve'"]
    monkeypatch.setattr(metadata, "requires", lambda _: needs)
    with pytest.raises(RuntimeError) as error:
        samelib.check_environment()
    assert "nowhere-to-be-found is missing; numpy is " in str(error.value) and "needs >=99" in str(error.value)
    assert str(error.value).endswith("pip install 'torch>=2.6' 'nowhere-to-be-found>=1' 'numpy>=99'")
