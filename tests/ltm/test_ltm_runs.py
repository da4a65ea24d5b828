"""LTM through the shared trainer, and its runs in the commands that take policies' runs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import backbone, same, source
from PIL import Image
from torch import Tensor

from agents.finetune.ltm import LTMConfig, LTMStudent
from agents.finetune.tuner import FineTuner
from tokenenv import ltm
from tokenenv.cli.main import main
from tokenenv.data import Batch, Stream
from tokenenv.errors import UserError
from tokenenv.game.cost import Cost
from tokenenv.measure import evaluation
from tokenenv.storage import flatten_state, read_tensors, unflatten_state, write_tensors
from tokenenv.vit.dense import Dense
from tokenenv.vit.load import check_name, load_model, untrained_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"updates": 8, "batch": 8, "lr": 1e-3, "ratio": 0.5, "evaluate_every": 4}


def teacher() -> Dense:
    return Dense(copy.deepcopy(backbone().model))


def config(**changes: Any) -> LTMConfig:
    return LTMConfig(**{**SMALL, **changes})


class Fixed:
    """Always the same images."""

    def next(self) -> Batch:
        return source().batch(torch.arange(8) * 11)


def tuner(settings: LTMConfig, seed: int = 0) -> tuple[FineTuner, Stream]:
    torch.manual_seed(seed)
    student = settings.student(teacher(), "digits_vit")
    order = Stream(source(), settings.batch, seed=3)
    return FineTuner(student, teacher(), order, settings, seed, clean=source()), order


def images(count: int) -> Tensor:
    return source().batch(torch.arange(count)).images


# Training


@pytest.mark.parametrize("mask", ["attention", "similar", "linear"])
def test_loss_falls(mask: ltm.MaskKind) -> None:
    settings = config(updates=12, lr=3e-3, mask=mask, ratio=0.6, eta=0.0)
    learner, _ = tuner(settings)
    learner.batches = Fixed()
    losses = [learner.update()["loss"] for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_masks_learn_faster_and_positions_do_not_decay() -> None:
    student = config().student(teacher(), "digits_vit")
    groups = student.groups(0.05, 20.0)
    members = [p for group in groups for p in group["params"]]
    assert len(set(map(id, members))) == len(members) == len(list(student.parameters()))
    masks = {id(p) for stack in student.model.stacks for p in stack.masks.parameters()}
    assert masks
    for group in groups:
        for p in group["params"]:
            assert group["lr_scale"] == (20.0 if id(p) in masks else 1.0)
            assert p.ndim > 1 or group["weight_decay"] == 0
    still = [g for g in groups if not g["weight_decay"]]
    assert any(student.model.model.pos_embed is p for g in still for p in g["params"])


def test_the_bound_counts_from_30_percent_on() -> None:
    learner, _ = tuner(config(updates=10))
    found = [learner.update()["bound_loss"] for _ in range(6)]
    assert found[:3] == [0, 0, 0]
    assert all(value > 0 for value in found[3:])


def test_the_bound_loss_is_the_label_term_of_what_the_model_merged() -> None:
    settings = config(eta=0.5)
    student = settings.student(teacher(), "digits_vit")
    student.before(settings.updates, source(), settings)
    batch = source().batch(torch.arange(6))
    terms = student.terms(student(batch.images), torch.empty(0), batch.labels, settings)
    with student.model.recording() as features:
        student.model(batch.images)
    expected = torch.zeros(())
    for feature, level in zip(features, student.bound.levels, strict=True):
        unit = feature / feature.norm(dim=1, keepdim=True)
        for image, label in zip(unit, batch.labels.tolist(), strict=True):
            distance = (image - level.centroids).square().sum(1)
            phi = (-10 * distance).exp() / (-10 * distance).exp().sum()
            expected -= (phi * level.log_q[:, label]).sum() / (len(features) * 6)
    assert terms["bound_loss"].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_the_bound_falls() -> None:
    # The bound alone teaches: on its own images it must fall.
    learner, _ = tuner(config(updates=24, lr=1e-3, class_loss=0.0, logit_loss=0.0, eta=5.0))
    before = learner.policy.judged(source(), source())  # type: ignore[operator]
    for _ in range(24):
        learner.update()
    after = learner.policy.judged(source(), source())  # type: ignore[operator]
    assert after["bound"] < before["bound"]


def test_with_a_ratio_of_one_it_is_the_dense_model_that_trains() -> None:
    learner, _ = tuner(config(ratio=1.0))
    student: Any = learner.student
    torch.testing.assert_close(student(images(4)).logits, teacher()(images(4)), rtol=0, atol=1e-5)
    for _ in range(4):
        assert learner.update()["bound_loss"] == 0
    assert student.judged(source(), source()) == {}
    assert not list(student.added())


def test_masks_by_family() -> None:
    merging = config(ratio=0.6).student(teacher(), "").model
    assert merging.config["mask"] == "similar"
    assert merging.lengths == [64, 64, 54, 46, 38, 38]  # helpers' model has 6 blocks: 2, 3 and 4
    convolutional = LTMConfig().student(Dense(timm.create_model("efficientvit_b0")), "").model
    assert (convolutional.config["mask"], convolutional.config["blocks"]) == ("attention", None)
    given = config(mask="attention", blocks=(1,)).student(teacher(), "").model
    assert given.lengths == [64, 36, 36, 36, 36, 36]


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_goes_on_exactly(stop: int, tmp_path: Path) -> None:
    settings = config(ema=0.9)
    whole, _ = tuner(settings)
    for _ in range(7):
        last = whole.update()

    broken, order = tuner(settings)
    for _ in range(stop):
        broken.update()
    tensors: dict[str, Tensor] = {}
    state = flatten_state("s", [broken.state_dict(), order.state_dict()], tensors)
    write_tensors(tmp_path / "state", tensors, state)

    again, order = tuner(settings, seed=0)
    torch.manual_seed(99)
    tensors, state = read_tensors(tmp_path / "state")
    mine, where = unflatten_state(state, tensors)
    again.load_state_dict(mine)
    order.load_state_dict(where)
    for _ in range(7 - stop):
        found = again.update()
    assert found == last
    assert same(dict(again.student.state_dict()), dict(whole.student.state_dict()))
    assert same(dict(again.policy.state_dict()), dict(whole.policy.state_dict()))


def test_the_average_has_a_bound_of_its_own() -> None:
    learner, _ = tuner(config())
    average: Any = learner.policy
    assert isinstance(average, LTMStudent)
    assert average.bound.model is average.model is not learner.student.model


# Measuring


def test_a_models_evaluation_is_what_plain_loops_give() -> None:
    model = ltm.ltm(backbone().model, 0.5).eval()
    some = source().subset(30, 0)
    found = evaluation.evaluate_model(model, teacher(), some, lengths=model.lengths, batch_size=7)
    for row in range(30):
        batch = some.batch(torch.tensor([row]))
        with torch.no_grad():
            logits, dense = model(batch.images), backbone()(batch.images)
        assert found.reduced[row] == logits.argmax()
        assert found.dense[row] == dense.argmax()
        loss = -logits.log_softmax(1)[0, batch.labels[0]]
        assert found.losses[row].item() == pytest.approx(loss.item(), abs=1e-4)
    assert found.macs.tolist() == [ltm.measure(model, images(2))] * 30
    assert found.lengths[0].tolist() == model.lengths


def test_a_dense_models_macs_are_its_backbones() -> None:
    assert evaluation.dense_macs(teacher(), (1, 8, 8)) == Cost(backbone()).dense()
    assert evaluation.dense_macs(backbone(), (1, 8, 8)) == Cost(backbone()).dense()


# The command line

COMMAND = (
    "train ltm --images 60 --set updates=4 --set evaluate_every=2 --set batch=8 "
    "--set ratio=0.6 --set held_back=0.3 --out"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ltm"
    assert main([*COMMAND.split(), str(out)]) == 0
    return out


def test_a_run_folder_evaluates_to_its_report(run: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("config.json", "curve.png", "checkpoint.safetensors"):
        assert (run / name).stat().st_size
    report = json.loads((run / "report.json").read_text())
    assert main(["evaluate", str(run), "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "fine-tuned backbone" in printed
    assert "M parameters, dense" in printed
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["frozen"] is False
    for key in (
        "top1", "top1_dense", "agreement", "gmacs", "gmacs_dense", "tokens", "parameters",
        "parameters_dense",
    ):  # fmt: skip
        assert found[key] == report[key], key
    assert report["gmacs_dense"] == pytest.approx(0.026460768)
    model = ltm.load_ltm(run)
    assert model.config["ratio"] == 0.6
    example = torch.zeros(1, 1, 8, 8)
    assert report["gmacs"] == pytest.approx(ltm.measure(model, example) / 1e9)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["parameters"] > report["parameters_dense"]


def test_the_bound_is_logged_at_every_evaluation(run: Path) -> None:
    history = json.loads((run / "report.json").read_text())["history"]
    judged = [row for row in history if "saving" in row]
    assert [row["update"] for row in judged] == [0, 2, 4]
    assert all({"bound", "ib"} <= row.keys() for row in judged)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("held_back/bound")] == [0, 2, 4]


def test_resuming_a_finished_run_changes_nothing(run: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    assert main([*COMMAND.split(), str(run), "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == before


def test_bench_times_it_beside_policies(run: Path, tmp_path: Path) -> None:
    command = ["bench", str(run), "norm:keep=0.5", "--batch", "1,2", "--rounds", "1"]
    command += ["--compile", "none", "--dtype", "float32"]
    files = ["--json", str(tmp_path / "b.json"), "--out", str(tmp_path / "b.png")]
    assert main([*command, *files]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    own = [row for row in rows if row["what"] == str(run)]
    assert [row["batch"] for row in own] == [1, 2]
    for row in own:
        assert row["slice_speedup"] is row["realised_share"] is None
        assert row["gmacs"] < row["gmacs_dense"]
        assert row["speedup"] > 0


def test_compare_shows_it_beside_policies(run: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["compare", str(run), "tome:r=2", "--limit", "20", "--batch", "2", "--rounds", "1"]
    assert main([*command, "--out", str(tmp_path / "c")]) == 0
    rows = json.loads((tmp_path / "c" / "table.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["dense", "dense, exact", str(run), "tome:r=2"]
    del rows[1]
    assert [row["frozen"] for row in rows] == [True, False, True]
    assert rows[1]["saved"] == pytest.approx(
        100 * (1 - ltm.measure(ltm.load_ltm(run), torch.zeros(1, 1, 8, 8)) / 26460768)
    )
    capsys.readouterr()
    # The same command finds its rows; a run alone needs no other.
    assert main([*command, "--out", str(tmp_path / "c")]) == 0
    assert main(["compare", str(run), *command[3:], "--out", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "pareto.png").stat().st_size


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("compress {run} --out {new}", "load_ltm"),
        ("evaluate {run} --model deit_tiny_patch16_224", "is a digits_vit with LTM blocks"),
        ("compare {run} tome:r=2 --model test_vit --out {new}", "is a digits_vit"),
        ("evaluate {run}:threshold=0.6", "leave ':threshold=0.6' out"),
        ("compare {run}:threshold=0.4|0.6 --out {new}", "leave ':threshold=0.4' out"),
        ("bench {broken}", "holds no LTM model"),
        ("evaluate {broken}", "doesn't say which one it was made of"),
        ("train ltm --set ratio=1.5 --out {new}", "ratio=1.5"),
        ("train ltm --set ratio=nan --out {new}", "ratio=nan"),
        ("train ltm --set eta=-1 --out {new}", "eta=-1"),
        ("train ltm --set mask=soft --out {new}", "mask takes auto or attention"),
        ("train ltm --set mixup=0.5 --out {new}", "one label per image"),
        ("train ltm --set keep=0.5 --out {new}", "unknown key"),
        ("train ltm --set ratio=0.1 --out {new}", "at least half"),
        ("train ltm --set blocks=3/12 --out {new}", "12 is out of range"),
        ("train ltm --model resnet18 --data x --out {new}", "no blocks for a ResNet"),
        ("train ltm --model swin_tiny_patch4_window7_224 --out {new}", "needs --data"),
        ("train mstm --model swin_tiny_patch4_window7_224 --out {new}", "VisionTransformer"),
    ],
)
def test_mistakes_are_named(words: str, named: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ltm.json").write_text("{}" if words.startswith("evaluate") else '{"model": "x"}')
    code = main([w.format(run=run, new=tmp_path / "new", broken=broken) for w in words.split()])
    error = capsys.readouterr().err
    assert code == 2
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_torchrun_writes_one_run_and_resumes_it(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "tokenenv"]
    for more in ([], ["--resume"]):
        command = [*torchrun, *COMMAND.split(), str(tmp_path / "run"), *more]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine-tuning digits_vit") == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["updates"] == 4


# The other families

FAMILIES = {
    "mobilevit_xxs": 256,
    "efficientvit_b0": 224,
    "swin_tiny_patch4_window7_224": 224,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(("n01440764", "n01443537")):
        (root / name).mkdir()
        for image in range(3):
            pixels = torch.rand(12, 12, 3, generator=torch.Generator().manual_seed(image + number))
            picture = Image.fromarray((255 * pixels).byte().numpy()).resize((240, 240))
            picture.save(root / name / f"{image}.png")
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_evaluated_and_benched(
    name: str, photographs: Path, tmp_path: Path
) -> None:
    ltm.save_ltm(ltm.ltm(untrained_model(name)), tmp_path / "merged")
    words = f"--weights random --json {tmp_path / 'r.json'}"
    data = ["--data", str(photographs)]
    assert main(["evaluate", str(tmp_path / "merged"), *words.split(), *data, "--batch", "3"]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    dense = untrained_model(name)
    example = torch.zeros(1, 3, FAMILIES[name], FAMILIES[name])
    assert found["images"] == 6
    assert found["gmacs_dense"] == pytest.approx(ltm.measure(dense, example) / 1e9)
    assert found["gmacs"] < 0.97 * found["gmacs_dense"]
    assert found["parameters_dense"] == sum(p.numel() for p in dense.parameters())
    bench = ["bench", str(tmp_path / "merged"), "--batch", "1", "--rounds", "1"]
    bench += ["--compile", "none", "--dtype", "float32"]
    assert main([*bench, *words.split()]) == 0
    assert json.loads((tmp_path / "r.json").read_text())[1]["gmacs"] == pytest.approx(
        found["gmacs"]
    )


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_other_families_train(name: str, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = f"train ltm --model {name} --weights random --out {out} --set updates=1 --set batch=2"
    words += " --set held_back=0.4 --set eta=1"
    assert main([*words.split(), "--data", str(photographs)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["gmacs"] < 0.97 * report["gmacs_dense"]
    assert json.loads((out / "config.json").read_text())["weights"] == "random"
    # The dense model is made again from what the run says.
    compare = ["compare", str(out), "--data", str(photographs), "--batch", "1", "--rounds", "1"]
    assert main([*compare, "--limit", "2", "--out", str(tmp_path / "c")]) == 0


def test_families_pass_on_their_own_path_only() -> None:
    from tokenenv.ltm.model import check_family

    check_name("swin_tiny_patch4_window7_224", check_family)
    with pytest.raises(UserError, match="VisionTransformer"):
        check_name("swin_tiny_patch4_window7_224")


def test_classes_are_read_from_any_familys_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tokenenv.ltm.model import check_family

    for name in ("mobilevit_xxs", "efficientvit_b0"):
        torch.manual_seed(1)
        state = timm.create_model(name, num_classes=3).state_dict()
        save_file(state, tmp_path / f"{name}.safetensors")
        model: Any = load_model(name, str(tmp_path / f"{name}.safetensors"), check=check_family)
        assert model.num_classes == 3
        assert same(dict(model.state_dict()), dict(state))
