"""Fine-tuning: losses, the trainer, run folders."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mistake
from helpers import backbone, same, source, start
from PIL import Image
from torch import Tensor

from agents.finetune.augment import augmentation
from agents.finetune.config import DynamicViTConfig, EViTConfig, FineTuneConfig, MSTMConfig
from agents.finetune.student import Student
from agents.finetune.tuner import FineTuner, half_precision
from agents.policies import load_policy
from agents.systems import find_system
from agents.training.request import Request
from agents.workers import Workers
from tokenenv.api.opening import open_candidates
from tokenenv.cli.main import main
from tokenenv.data import Batch, Stream
from tokenenv.errors import UserError
from tokenenv.measure.opening import Model, named_model
from tokenenv.storage import flatten_state, read_tensors, unflatten_state, write_tensors
from tokenenv.vit.digits import WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"updates": 8, "batch": 8, "lr": 1e-3, "blocks": (1, 3), "keep": 0.5}


class Fixed:
    """Always the same images, or one process's part of them."""

    def __init__(self, rows: slice = slice(None), parts: int = 1) -> None:
        whole = source().batch(torch.arange(8) * 11)
        self.batches = [
            Batch(*(field[rows].chunk(parts)[i] for field in whole)) for i in range(parts)
        ]
        self.turn = 0

    def next(self) -> Batch:
        self.turn += 1
        return self.batches[(self.turn - 1) % len(self.batches)]


def tuner(config: FineTuneConfig, batches: Any = None, seed: int = 0) -> FineTuner:
    torch.manual_seed(seed)
    model = copy.deepcopy(backbone().model).requires_grad_(True)
    config.prepare(model)
    student = Student(model, config.method(backbone(), "digits_vit"))
    return FineTuner(student, backbone(), batches or Fixed(), config, seed)


def mstm(**changes: Any) -> MSTMConfig:
    return MSTMConfig(**{**SMALL, **changes})


# Losses


# The trainer


def test_what_is_new_learns_faster_and_vectors_do_not_decay() -> None:
    config = mstm()
    student = tuner(config).student
    groups = student.groups(0.05, 20.0)
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(map(id, members))) == len(list(student.parameters()))
    assert len(student.state_dict()) == len(members)  # nothing twice: it would be averaged twice
    new = {id(p) for p in student.added()}
    assert len(new) == 6
    for group in groups:
        for p in group["params"]:
            assert group["lr_scale"] == (20.0 if id(p) in new else 1.0)
            assert p.ndim > 1 or group["weight_decay"] == 0
    assert {"pos_embed", "cls_token"} <= student.model.no_weight_decay()
    still = [g for g in groups if not g["weight_decay"]]
    assert any(student.model.pos_embed is p for g in still for p in g["params"])


@pytest.mark.parametrize(
    "config",
    [
        mstm(lr=3e-3, updates=12),
        EViTConfig(**{**SMALL, "lr": 3e-3, "updates": 12}),
        DynamicViTConfig(**{**SMALL, "lr": 3e-3, "updates": 12}),
    ],
    ids=["mstm", "evit", "dynamicvit"],
)
def test_loss_falls(config: FineTuneConfig) -> None:
    learner = tuner(config)
    losses = [learner.update()["loss"] for _ in range(config.updates)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_rate_warms_up_and_falls() -> None:
    learner = tuner(mstm(updates=10, warmup=0.2, lr=1e-3, min_lr=1e-5, added_rate=1.0))
    rates = [learner.update()["lr"] for _ in range(10)]
    assert rates[0] == 0
    assert max(rates) == rates[2] == pytest.approx(1e-3, rel=0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 1e-4


def test_without_ema_the_last_weights_are_kept() -> None:
    learner = tuner(mstm(ema=0.0))
    for _ in range(3):
        learner.update()
    kept, last = learner.policy.state_dict(), learner.student.state_dict()
    assert all(torch.equal(kept[name], last[name]) for name in last)
    average = tuner(mstm(ema=0.9))
    for _ in range(3):
        average.update()
    assert not same(dict(average.policy.state_dict()), dict(average.student.state_dict()))


def weights(learner: FineTuner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.student.named_parameters()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_parts_of_a_batch_teach_what_the_whole_does() -> None:
    # SGD: Adam's first step is the gradient's sign, which rounding can turn.
    config = mstm(optimizer="sgd", lr=0.1, warmup=0.0, clip=100.0)
    whole = tuner(config, Fixed())
    parts = tuner(dataclasses.replace(config, accumulate=4), Fixed(parts=4))
    before = weights(whole)
    for _ in range(2):
        found = [learner.update() for learner in (whole, parts)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    close(weights(whole), weights(parts))
    assert not same(before, weights(whole))


def resumable(config: FineTuneConfig) -> tuple[FineTuner, Stream]:
    augment = augmentation(backbone().model, (1, 8, 8), crop=0.5, hflip=0.5, auto_augment="")
    assert augment is not None
    order = Stream(source().augmented(augment), config.batch, seed=3)
    return tuner(config, order), order


@pytest.mark.parametrize(
    "config",
    [
        mstm(mixup=0.8, cutmix=1.0, smoothing=0.1, ema=0.9),
        DynamicViTConfig(**SMALL),
    ],
    ids=["mstm", "dynamicvit"],
)
def test_a_run_goes_on_exactly(config: FineTuneConfig, tmp_path: Path) -> None:
    whole, _ = resumable(config)
    for _ in range(5):
        last = whole.update()

    broken, order = resumable(config)
    for _ in range(3):
        broken.update()
    tensors: dict[str, Tensor] = {}
    state = flatten_state("s", [broken.state_dict(), order.state_dict()], tensors)
    write_tensors(tmp_path / "state", tensors, state)

    torch.manual_seed(99)
    again, order = resumable(config)
    tensors, state = read_tensors(tmp_path / "state")
    mine, where = unflatten_state(state, tensors)
    again.load_state_dict(mine)
    order.load_state_dict(where)
    for _ in range(2):
        found = again.update()
    assert found == last
    assert same(dict(again.student.state_dict()), dict(whole.student.state_dict()))
    assert same(dict(again.policy.state_dict()), dict(whole.policy.state_dict()))


def test_generators_are_left_as_they_were() -> None:
    learner, _ = resumable(mstm(mixup=0.8))
    torch.manual_seed(5)
    np.random.seed(5)
    learner.update()
    drawn = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), np.random.rand())


def test_mixed_precision_learns_the_same_roughly() -> None:
    full = tuner(mstm(amp="off"))
    half = tuner(mstm(amp="bfloat16"))
    losses = [[learner.update()["loss"] for _ in range(3)] for learner in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
    assert half_precision("auto", torch.device("cpu")) is None


TWO = """
import pickle, sys
import torch
from agents.workers import join
from agents.finetune.student import Student
from agents.finetune.tuner import FineTuner
from helpers import backbone
from test_finetune import Fixed, mstm, tuner, weights
torch.set_num_threads(1)
config = mstm(optimizer="sgd", lr=0.1, warmup=0.0, clip=100.0, accumulate=2)
with join("cpu") as (workers, device):
    alone = tuner(config)
    half = slice(4 * workers.rank, 4 * workers.rank + 4)
    learner = FineTuner(
        alone.student, backbone(), Fixed(half, parts=2), config, 0, workers
    )
    for _ in range(2):
        learner.update()
    assert workers.agree(workers.rank == 1) and not workers.agree(False)
    if workers.rank == 0:
        torch.save(weights(learner), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    for process in start(TWO, str(tmp_path / "weights")):
        _, words = process.communicate(timeout=240)
        assert process.returncode == 0, words
    whole = tuner(mstm(optimizer="sgd", lr=0.1, warmup=0.0, clip=100.0))
    for _ in range(2):
        whole.update()
    close(weights(whole), torch.load(tmp_path / "weights", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["mstm", "rl4evit"])
def test_torchrun_writes_one_run_and_resumes_it(system: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "tokenenv"]
    for more in ([], ["--resume"]):
        words = COMMAND if system == "mstm" else COMMAND.replace("mstm --set keep=0.5", system)
        command = [*torchrun, *words.split(), str(tmp_path / "run"), *more]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("held back to compare") == 1
    assert "2 processes" in done.stdout
    assert json.loads((tmp_path / "run" / "report.json").read_text())["updates"] == 2


def test_a_backbone_goes_on_with_as_many_processes(tmp_path: Path) -> None:
    request = Request(find_system("mstm"), mstm(batch=8, held_back=0.3), Model(), images=60)
    training = request.config.training(request, Workers(), tmp_path)
    training.trainer.config["processes"] = 2  # as two would have left it
    training.trainer.updates = 0
    training.trainer.run()
    again = dataclasses.replace(request, resume=True)
    with pytest.raises(UserError, match=r"processes=1: it was started with processes=2"):
        again.config.training(again, Workers(), tmp_path)


# The command line

COMMAND = (
    "train mstm --set keep=0.5 --images 60 --set updates=2 --set evaluate_every=1 --set batch=8 "
    "--set held_back=0.3 --out"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mstm"
    assert main([*COMMAND.split(), str(out)]) == 0
    return out


def test_a_run_folder_evaluates_to_its_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "curve.png", "tokens.png", "checkpoint.safetensors"):
        assert (run / name).stat().st_size
    report = json.loads((run / "report.json").read_text())
    assert report["frozen"] is False
    assert json.loads((run / "config.json").read_text())["frozen"] is False
    assert main(["evaluate", str(run), "--json", str(tmp_path / "r.json")]) == 0
    assert "fine-tuned backbone" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["frozen"] is False
    for key in ("top1", "top1_dense", "agreement", "gmacs", "gmacs_dense", "tokens"):
        assert found[key] == report[key], key
    # Compared with the model before, which had no second scale.
    assert report["gmacs_dense"] == pytest.approx(0.026460768)
    # Neither --model nor --weights, those it started from, make it another model.
    for more in (["--model", "digits_vit"], ["--weights", str(WEIGHTS)]):
        assert main(["evaluate", str(run), *more, "--json", f"{tmp_path}/s"]) == 0
        assert json.loads((tmp_path / "s").read_text())["predictions"] == found["predictions"]


@pytest.mark.parametrize("command", ["evaluate RUN", "bench RUN --batch 1", "compress RUN --out f"])
def test_a_run_is_no_other_model(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.replace("RUN", str(run))
    error = mistake(f"{words} --model vit_tiny_patch16_224 --weights random", capfd)
    assert "a digits_vit was fine-tuned there, not a vit_tiny_patch16_224" in error
    shutil.copytree(run, "broken")
    Path("broken/model.safetensors").unlink()
    error = mistake(command.replace("RUN", "broken"), capfd)
    assert "'broken' was fine-tuned and 'broken/model.safetensors' is missing" in error


def test_a_run_by_two_paths_is_one_row(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    command = "compare mstm/ ./mstm ././mstm/ --limit 8 --batch 1 --rounds 1 --out"
    assert main([*command.split(), str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "dense",
        "dense, exact",
        "./mstm",
    ]  # mstm is the method


def test_a_run_is_compressed_with_its_own_weights(run: Path, tmp_path: Path) -> None:
    assert main(["compress", str(run), "--out", str(tmp_path / "fast")]) == 0
    files = [read_file(place / "model.safetensors") for place in (run, tmp_path / "fast")]
    assert same(*files)
    assert "patch_embed.gate.weight" in files[0]


def read_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_resuming_a_finished_run_changes_nothing(run: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    assert main([*COMMAND.split(), str(run), "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == before


def test_fine_tuned_backbones_each_run_on_their_own(run: Path, tmp_path: Path, capsys: Any) -> None:
    other = str(shutil.copytree(run, tmp_path / "other"))
    assert main(["bench", str(run), other, "--batch", "1", "--rounds", "1"]) == 0
    assert other in capsys.readouterr().out
    opened = open_candidates([str(run), other], named_model(None, None, "cpu", "float32", None))
    one, two = (each.backbone for each in opened.candidates)
    assert one is not two and opened.dense not in (one, two)


def test_a_second_phase_keeps_the_policy(tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    words = "train rl4evit-finetune --images 40 --set updates=1 --set batch=4 --set held_back=0.2"
    assert main([*words.split(), "--set", "policy=norm:keep=0.5", "--out", str(out)]) == 0
    assert load_policy(out / "policy.safetensors").keep == 0.5  # type: ignore[attr-defined]
    before, after = backbone_state(), read_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert not same(before, after)


def backbone_state() -> dict[str, Tensor]:
    from tokenenv.vit.load import load_backbone

    return dict(load_backbone().model.state_dict())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("mstm --set optimizer=adamx", "optimizer=adamx"),
        ("mstm --set amp=float16", "amp=float16"),
        ("mstm --set amp=int8", "amp"),
        ("mstm --set keep=0", "keep=0"),
        ("mstm --set keep=1.5", "keep=1.5"),
        ("mstm --set lr=nan", "lr=nan"),
        ("mstm --set ema=1", "ema=1"),
        ("mstm --set optimizer=adahessian", "optimizer=adahessian needs second derivatives"),
        ("mstm --set optimizer=adafactorbv", "optimizer=adafactorbv has a state"),
        ("mstm --set batch=8 --set accumulate=3", "accumulate=3"),
        ("mstm --set batch=5000", "batch=5000"),
        ("mstm --set batch=6 --set accumulate=2 --set mixup=0.8", "even"),
        ("mstm --set auto_augment=fancy", "auto_augment=fancy"),
        ("mstm --set blocks=3/20", "20 is out of range"),
        ("rl4evit-finetune", "policy=RUN"),
        ("rl4evit-finetune --set policy=nobody-knows", "nobody-knows"),
        ("rl4evit-finetune --set policy=rl4evit-deit_tiny", "trained on model"),
        ("dynamicvit --set polish=1", "unknown key"),
    ],
)
def test_bad_settings_are_named(
    words: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", *words.split(), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_ends_in_words(tmp_path: Path, capsys: Any) -> None:
    words = "train evit --images 60 --set batch=8 --set updates=6 --set lr=1e4 --set clip=1e9"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 2
    assert "training diverged (loss nan): use a smaller learning rate" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_named(tmp_path: Path, capsys: Any) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "0.png")
    command = ["train", "evit", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "cat" in capsys.readouterr().err
