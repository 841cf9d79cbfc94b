"""Pictures of a run: every curve is the log's, and without matplotlib there is none."""
import json
import sys

import numpy as np
import pytest

from minikd import plots


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of every figure that is saved."""
    figure = pytest.importorskip("matplotlib.figure")
    found, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *given, **options: (
        found.extend(self.axes), save(self, *given, **options)))
    return found


def curves(axes) -> dict[str, list[tuple]]:
    return {line.get_label(): list(zip(*(np.asarray(data).tolist() for data in line.get_data()))) for line in axes.get_lines()}


def log(folder, *lines):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_the_evaluations_of_each_run_and_the_teacher_is_dashed(drawn, tmp_path):
    one = log(tmp_path / "one", {"step": 1, "ce": 9.0}, {"step": 1, "valid_ce": 2.0, "rouge_l": 30.0},
              {"step": 2, "valid_ce": 1.0, "rouge_l": 40.0}, {"step": 2, "done": True})
    two = log(tmp_path / "two", {"step": 2, "valid_ce": 1.5, "rouge_l": 35.0})
    assert plots.plot_curves({"SFT": one, "KD": two}, tmp_path / "curves.png", teacher=50.0) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss, rouge = drawn
    assert [axes.get_ylabel() for axes in drawn] == ["held-out cross-entropy (nats per token)", "ROUGE-L"] and rouge.get_legend()
    assert curves(loss) == {"SFT": [(1, 2.0), (2, 1.0)], "KD": [(2, 1.5)]}
    assert {name: curves(rouge)[name] for name in ("SFT", "KD")} == {"SFT": [(1, 30.0), (2, 40.0)], "KD": [(2, 35.0)]}
    assert {y for _, y in curves(rouge)["teacher"]} == {50.0} and rouge.get_lines()[-1].get_linestyle() == "--"


def test_rewards_are_the_steps_and_one_that_nothing_judged_is_a_gap(drawn, tmp_path):
    step = {"reward": 0.5, "reward/format": 1.0, "reward/format/std": 0.1, "kl": 0.01, "length": 20.0}
    folder = log(tmp_path / "run", {"step": 0, "valid_greedy": 0.5}, {"step": 1} | step,
                 {"step": 2} | step | {"reward": None, "kl": 0.02, "length": 30.0})
    assert plots.plot_rewards(folder, tmp_path / "curves.png") == tmp_path / "curves.png"
    reward, kl, length = drawn
    assert [axes.get_ylabel() for axes in drawn] == ["reward", "KL (nats per token)", "tokens per answer"] and reward.get_legend()
    assert str(curves(reward)) == str({"reward": [(1, 0.5), (2, float("nan"))], "format": [(1, 1.0), (2, 1.0)]})
    assert list(curves(kl).values()) == [[(1, 0.01), (2, 0.02)]]
    assert list(curves(length).values()) == [[(1, 20.0), (2, 30.0)]]


def test_a_matplotlib_that_does_not_load_costs_only_the_picture(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    class Broken:
        def find_spec(self, name, *_):
            if name == "matplotlib.figure":
                raise ValueError("'Nope' is not a valid value for backend")

    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert plots.plot_curves({}, tmp_path / "curves.png") is None
    assert "no picture, as matplotlib does not load ('Nope'" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plots.plot_curves({}, tmp_path / "curves.png") is None and plots.plot_rewards(tmp_path, tmp_path / "x.png") is None
    assert list(tmp_path.iterdir()) == []
