"""The recipe of the embedded model, and the checkpoint it made."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlavaForConditionalGeneration

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.scenes import Question, SceneObject, generate
from training import __main__ as command
from training import (
    card,
    checkpoint,
    evaluate,
    labels,
    looking,
    optimizer,
    packing,
    settings,
    stages,
    strangers,
    wording,
    world,
)
from training import items as asked_of
from training.forward import decode, embed, image_features, pixels_to_input
from training.independent import picture

EMBEDDED = Path(checkpoint.__file__).parents[1] / "latent_tool" / "models" / "embedded"
PLAIN = replace(settings.FULL, reasoning_share=0.0, copies_share=0.0, reword_share=0.0)


@pytest.fixture(scope="module")
def processor() -> checkpoint.LlavaProcessor:
    return checkpoint.build_processor(settings.FULL)


@pytest.fixture(scope="module")
def shipped() -> evaluate.Answerer:
    return evaluate.Answerer(EMBEDDED)


# --- data ------------------------------------------------------------------------------------------------------


def test_cells_of_boxes() -> None:
    assert labels.cells_of([(0, 0, 11, 11)]) == [0]
    assert labels.cells_of([(11, 0, 13, 11)]) == [0, 1]
    assert labels.cells_of([(-5, -5, 200, 200)]) == list(range(64))
    assert labels.cells_of([]) == []


def test_dense_labels_name_what_covers_a_cell() -> None:
    big = SceneObject("star", "red", (12.0, 12.0, 36.0, 36.0), (24.5, 24.5), 400.0)
    classes, offsets = labels.dense_labels([big])
    name = classes[0].reshape(8, 8)
    assert (name[1:3, 1:3] == labels.NAME_INDEX["star"]).all()
    assert (classes[1].reshape(8, 8)[1:3, 1:3] == labels.COLOR_INDEX["red"]).all()
    assert classes[2].sum() == 1 + labels.IGNORE * (classes[2] == labels.IGNORE).sum()
    assert classes[2].reshape(8, 8)[2, 2] == 1
    assert name[6, 6] == labels.NAME_INDEX["nothing"]
    np.testing.assert_allclose(offsets.reshape(8, 8, 2)[2, 2], [0.5 / 12 - 0.5, 0.5 / 12 - 0.5], atol=1e-6)
    assert (labels.dense_labels(None)[0] == labels.IGNORE).all()


def test_rewording_keeps_the_words_that_matter() -> None:
    rng = random.Random(0)
    changed = 0
    for seed in range(60):
        for question in generate(seed, "train").questions:
            noisy = wording.reword(question.text, rng)
            changed += noisy != question.text
            kept = noisy.lower().split()
            for word in question.text.lower().split():
                assert word in kept or word in wording._SMALL
    assert changed > 200


@pytest.mark.slow
def test_samples_are_the_same_every_time_and_stretched() -> None:
    for number in range(40):
        one, again = world.sample(number, settings.FULL), world.sample(number, settings.FULL)
        assert one.image.tobytes() == again.image.tobytes()
        assert one.questions == again.questions
        assert one.image.size == (96, 96)


@pytest.mark.parametrize("views", [0, 1, 2])
def test_looking_samples_are_the_same_every_time(views: int) -> None:
    for number in range(30):
        one, again = (looking.looking_sample(number, settings.FULL, views) for _ in range(2))
        assert one.questions == again.questions
        assert len(one.views) == views
        for picture_, other in zip((one, *one.views), (again, *again.views), strict=True):
            assert picture_.image.size == (96, 96)
            assert picture_.image.tobytes() == other.image.tobytes()
        for view in one.views:
            left, top, right, bottom = view.window
            assert -0.01 <= left < right <= 96.01 and -0.01 <= top < bottom <= 96.01


@pytest.mark.slow
def test_most_of_the_third_stage_is_ordinary_and_answered() -> None:
    unanswerable = ordinary = everything = 0
    for number in range(200):
        one = looking.looking_sample(number, settings.FULL, settings.FULL.looking_windows[number % 10])
        everything += len(one.questions)
        mine = sum(q.answer == looking.CANNOT_TELL for q in one.questions)
        unanswerable += mine
        ordinary += mine < len(one.questions)
        assert all((q.answer == looking.CANNOT_TELL) == (q.type == looking.UNANSWERABLE) for q in one.questions)
    assert 0.1 < unanswerable / everything < 0.25
    assert ordinary > 160


def test_what_is_named_but_absent_is_found() -> None:
    there = [
        SceneObject("star", "red", (0, 0, 9, 9), (4, 4), 80.0),
        SceneObject("bar", "blue", (0, 0, 9, 9), (4, 4), 80.0),
    ]
    for text, absent in (
        ("What color is the star?", ""),
        ("What color is the ring?", "ring"),
        ("Is the red star left of the blue cross?", "blue cross"),
        ("What shape is the green thing?", "green"),
        ("Is the blue bar taller than the red bar?", "red bar"),
        ("Which shape is topmost?", ""),
        ("Who wrote this?", ""),
    ):
        assert looking.names_something_absent(text, there) == absent


def test_what_is_too_small_in_every_picture_cannot_be_told() -> None:
    small = Question("shape", "What shape is the red thing?", "star", "", ((40.0, 40.0, 42.0, 42.0),))
    large = replace(small, boxes=((40.0, 40.0, 60.0, 60.0),))
    image = Image.new("RGB", (96, 96))
    plain = world.Sample(image, ())
    near = replace(plain, views=(world.View(image, (32.0, 32.0, 56.0, 56.0)),))
    cut = replace(plain, views=(world.View(image, (41.0, 32.0, 65.0, 56.0)),))
    assert looking._legible(large, "shapes", plain)
    assert not looking._legible(small, "shapes", plain)
    assert looking._legible(small, "shapes", near)
    assert not looking._legible(small, "shapes", cut)
    assert looking._legible(replace(small, type="color"), "shapes", plain)


def test_strangers_are_pictures_of_any_size() -> None:
    made = [strangers.stranger(random.Random(seed)) for seed in range(60)]
    assert all(image.mode == "RGB" and min(image.size) >= 8 for image in made)
    assert len({image.size for image in made}) > 40
    assert made[3].tobytes() == strangers.stranger(random.Random(3)).tobytes()


@pytest.mark.slow
def test_training_never_sees_what_is_measured() -> None:
    assert not set(world.TRAINING_PHOTOGRAPHS) & set(world.TEST_PHOTOGRAPHS)
    shown = {image.tobytes() for image, _ in world.easy_vqa("train")}
    tested = [image.tobytes() for image, _ in world.easy_vqa("test")]
    assert sum(image in shown for image in tested) < 0.01 * len(tested)
    texts = {q.text.lower() for seed in range(600) for q in generate(seed, "train").questions}
    apart = [q.text.lower() for seed in range(150) for q in picture(seed).questions]
    assert np.mean([text in texts for text in apart]) < 0.02


def test_independent_pictures_are_the_same_every_time() -> None:
    assert picture(3).image.tobytes() == picture(3).image.tobytes()
    assert picture(3).questions == picture(3).questions
    assert picture(4).image.tobytes() != picture(3).image.tobytes()


# --- packing and forward ---------------------------------------------------------------------------------------


def _sample(*questions: Question) -> world.Sample:
    return world.Sample(world.stretch(generate(2, "train", "shapes").image), questions)


def _window_of(image: Image.Image, number: int) -> world.View:
    box = (12 * number, 24, 12 * number + 40, 72)
    return world.View(image.crop(box).resize((96, 96)), tuple(float(side) for side in box))


def test_what_a_question_rests_on_is_marked_in_every_picture(processor: checkpoint.LlavaProcessor) -> None:
    question = Question("color", "What color is the star?", "red", "", ((20.0, 30.0, 30.0, 40.0),))
    sample = replace(_sample(question), views=(_window_of(_sample().image, 0), _window_of(_sample().image, 4)))
    relevant = packing.Packer(processor.tokenizer, PLAIN).pack([sample], [0]).relevant[0, 0]
    whole, first, second = relevant.split(settings.CELLS)
    assert whole.nonzero()[:, 0].tolist() == labels.cells_of(question.boxes)
    # the window from (0, 24) to (40, 72) shows it at 2.4 times its width, and twice its height
    assert first.nonzero()[:, 0].tolist() == labels.cells_of([(48.0, 12.0, 72.0, 32.0)])
    assert not second.any()  # it begins at x = 48


def test_a_question_is_laid_out_as_the_chat_template_lays_it_out(processor: checkpoint.LlavaProcessor) -> None:
    recipe = replace(PLAIN, reasoning_share=1.0)
    packer = packing.Packer(processor.tokenizer, recipe)
    question = Question("color", "What color is the star?", "red", "star left red")
    for seed in range(200):  # until the noise leaves the reasoning whole
        segment = packer.segment(question, random.Random(seed))
        if not segment.mixtures and checkpoint.END_THINK in segment.labels and segment.weights.count(0.5) == 4:
            break
    text = "<|user|><image>What color is the star?<|assistant|><think>star left red</think>red<|end|>"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    opened = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith(opened)
    expected = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert [checkpoint.USER, checkpoint.IMAGE, *segment.ids, checkpoint.END] == expected
    spoken = [label for label in segment.labels if label != labels.IGNORE]
    tail = processor.tokenizer("star left red</think>red<|end|>", add_special_tokens=False).input_ids
    assert spoken == tail


def test_packed_rows_hold_whole_questions(processor: checkpoint.LlavaProcessor) -> None:
    recipe = settings.FULL
    batch = packing.Packer(processor.tokenizer, recipe).batch(range(8))
    rows = batch.question.view(8, recipe.rows, recipe.row_length)
    assert batch.questions > 40
    for b in range(8):
        for owner in set(batch.question[b].tolist()) - {-1}:
            assert sum(bool((row == owner).any()) for row in rows[b]) == 1
            place = (batch.question[b] == owner).nonzero()[:, 0]
            assert batch.positions[b, place].tolist() == list(range(len(place)))
    copied = batch.cells >= 0
    assert (batch.ids[copied] == checkpoint.PAD).all()
    assert ((batch.mixture.sum(-1) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize(
    ("system", "windows"), [("", 0), ("You are a helpful assistant.", 0), ("", 1), ("You are a helpful assistant.", 2)]
)
def test_packed_forward_equals_the_model(processor: checkpoint.LlavaProcessor, system: str, windows: int) -> None:
    """The functions of training give the numbers of ``LlavaForConditionalGeneration``; float32, so 1e-4.

    Windows stand where the chat template puts several pictures: one after the other, before the question.
    """
    torch.manual_seed(1)
    model = checkpoint.build_model(settings.FULL, len(processor.tokenizer)).eval()
    questions = [Question("color", f"What color is the {shape}?", "red", "") for shape in ("star", "ring", "cross")]
    sample = _sample(*questions)
    sample = replace(sample, views=tuple(_window_of(sample.image, k) for k in range(windows)))
    before = [checkpoint.SYSTEM, *processor.tokenizer(system, add_special_tokens=False).input_ids] if system else []
    batch = packing.Packer(processor.tokenizer, PLAIN).pack([sample], [0], system=before)
    features = image_features(model, pixels_to_input(batch.pixels), batch.views)
    chosen = batch.ids == checkpoint.ASSISTANT
    found = decode(model, features, embed(model, features, batch), batch, chosen, PLAIN.row_length, True)
    ours = F.linear(found.hidden, model.lm_head.weight)
    order = batch.question[chosen].tolist()
    reference = model.__class__(model.config)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    for row, index in enumerate(order):
        content = [{"type": "image"}] * (1 + windows) + [{"type": "text", "text": questions[index].text}]
        messages = [{"role": "system", "content": system}] if system else []
        text = processor.apply_chat_template(
            [*messages, {"role": "user", "content": content}], add_generation_prompt=True
        )
        shown = [sample.image, *(view.image for view in sample.views)]
        inputs = processor(text=text, images=shown, return_tensors="pt")
        with torch.inference_mode():
            theirs = reference.eval()(**inputs, output_attentions=True)
        torch.testing.assert_close(ours[row], theirs.logits[0, -1], atol=1e-4, rtol=1e-4)
        cells = inputs["input_ids"][0] == checkpoint.IMAGE
        look = torch.stack([layer[0].mean(0)[-1, cells] for layer in theirs.attentions]).mean(0)
        torch.testing.assert_close(found.attention[row], look, atol=1e-5, rtol=1e-3)


def test_orthogonalised_matrices_keep_their_directions() -> None:
    """Singular vectors stay, singular values go near one (Muon's iteration is deliberately rough: 0.3 to 1.4)."""
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 12, 32), (2, 32, 12)):
        matrices = torch.randn(*shape)
        made = optimizer.orthogonalise(matrices)
        values = torch.linalg.svdvals(made)
        assert values.max() < 1.4
        assert values.median() > 0.5
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        assert (u.transpose(1, 2) @ made @ v.transpose(1, 2)).diagonal(dim1=1, dim2=2).min() > -0.05


def test_the_step_of_a_matrix_is_that_of_torch() -> None:
    """``torch.optim.Muon`` gives the same step, in bfloat16: two further digits are its rounding."""
    for shape in ((24, 24), (48, 24), (24, 48)):
        torch.manual_seed(0)
        theirs, before = torch.nn.Parameter(torch.randn(*shape)), None
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(shape[1], shape[0], bias=False)])})
        ours = model["layers"][0].weight  # type: ignore[index]
        ours.data.copy_(theirs.data)
        reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.05, momentum=0.95, ns_steps=4)
        mine = optimizer.Optimizer(model, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
        for _ in range(3):
            before = theirs.detach().clone()
            gradient = torch.randn(*shape)
            theirs.grad, ours.grad = gradient.clone(), gradient.clone()
            reference.step()
            mine.step(0.02, 1.0)
            moved = (theirs - before).norm()
            assert (theirs - ours).norm() < 0.05 * moved
            ours.data.copy_(theirs.data)


# --- running ---------------------------------------------------------------------------------------------------

_SMALL = replace(
    settings.QUICK,
    vision_steps=3,
    language_steps=4,
    looking_steps=4,
    vision_batch=2,
    language_batch=2,
    looking_batch=2,
    language_decay=2,
    looking_decay=2,
    save_every=2,
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    stages.Trainer(_SMALL, whole, 0, 1).run()
    name = ("vision_step", "language_step", "looking_step")[stage]
    step = getattr(stages.Trainer, name)

    def dies(self: stages.Trainer, number: int, batch: packing.Batch) -> None:
        if number == 3:
            raise KeyboardInterrupt
        step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Trainer, name, dies)
        with pytest.raises(KeyboardInterrupt):
            stages.Trainer(_SMALL, stopped, 0, 1).run()
    again = stages.Trainer(_SMALL, stopped, 0, 1)
    assert (again.stage, again.step) == (stage, 2)
    again.run()
    one, other = stages.load_model(_SMALL, whole), stages.load_model(_SMALL, stopped)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_third_stage_can_begin_at_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what ships on, without the stages before; the vision tower stays as it is, the decoder does not."""
    recipe = replace(
        settings.FULL, looking_steps=2, looking_batch=2, looking_decay=1, looking_windows=(0, 1), processes=1
    )
    run = tmp_path / "run"
    run.mkdir()
    stages.begin_from(EMBEDDED, recipe, run)
    stages.Trainer(recipe, run, 0, 1).run()
    trained = stages.load_model(recipe, run)
    saved = torch.load(run / "state.pt", weights_only=False)
    assert (saved["stage"], saved["step"]) == (2, 2)
    before = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed) and any("projector" in name for name in changed)

    with pytest.raises(SettingsError, match="another shape"):
        stages.train(replace(recipe, text_layers=2), tmp_path / "other", resume=False, start=EMBEDDED)
    with pytest.raises(SettingsError, match="no checkpoint"):
        stages.train(recipe, tmp_path / "none", resume=False, start=tmp_path / "nowhere")
    with monkeypatch.context() as patch:
        _ask_otherwise(patch)
        with pytest.raises(SettingsError, match="another vocabulary"):
            stages.train(recipe, tmp_path / "words", resume=False, start=EMBEDDED)
    assert command.main(["--out", str(tmp_path / "out"), "--run", str(tmp_path / "x"), "--from", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_crash_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(OSError, match="full"), checkpoint.replacing(target) as folder:
        (folder / "file").write_text("half")
        raise OSError("disk full")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with checkpoint.replacing(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer = stages.Trainer(_SMALL, tmp_path, 0, 1)
    trainer.save()
    with pytest.raises(SettingsError, match="another recipe"):
        stages.Trainer(replace(_SMALL, vision_steps=5), tmp_path, 0, 1)


def test_a_stopped_run_is_not_thrown_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trainer = stages.Trainer(settings.QUICK, run, 0, 1)
    trainer.step = 100
    trainer.save()
    before = (run / "state.pt").read_bytes()
    arguments = ["--quick", "--out", str(tmp_path / "model"), "--run", str(run)]
    assert command.main(arguments) == 2
    assert "(vision, step 100)" in (said := capsys.readouterr().err) and "--resume" in said
    assert command.main([*arguments, "--resume", "--seed", "3"]) == 2
    assert "another recipe" in capsys.readouterr().err
    assert (run / "state.pt").read_bytes() == before
    (run / "state.pt").write_bytes(before[:1000])
    assert command.main([*arguments, "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def _ask_otherwise(patch: pytest.MonkeyPatch) -> None:
    """The generator asks other questions; few of them, so that their vocabulary is learnt in no time."""
    few = [generate(seed, "train") for seed in range(20)]
    patch.setattr(checkpoint, "generate", lambda seed, _: few[seed % len(few)])
    patch.setattr(checkpoint, "SYSTEM_PROMPTS", ["whatever you say, captain"])


def test_a_state_of_other_questions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary is learnt from what the generator asks: with another, numbers mean other words."""
    stages.Trainer(_SMALL, tmp_path, 0, 1).save()
    stages.Trainer(_SMALL, tmp_path, 0, 1)
    _ask_otherwise(monkeypatch)
    with pytest.raises(SettingsError, match="another vocabulary"):
        stages.Trainer(_SMALL, tmp_path, 0, 1)


# The command; it writes a line after every step, so that one step shows that it trains.
_WATCHED = """
import sys
from dataclasses import replace
from training import settings
from training.__main__ import main
settings.QUICK = replace(settings.QUICK, log_every=1)
sys.exit(main())
"""


@pytest.mark.slow
def test_nothing_trains_on_when_the_command_is_killed(tmp_path: Path) -> None:
    """Also in the background of a script, where an interrupt is ignored: ``--resume`` would meet the old processes."""
    run = tmp_path / "run"
    arguments = ["--quick", "--out", str(tmp_path / "model"), "--run", str(run)]
    started = subprocess.Popen(
        [sys.executable, "-c", _WATCHED, *arguments],
        cwd=Path(checkpoint.__file__).parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    descendants: list[int] = []
    try:
        _wait(lambda: (run / "log.jsonl").exists())
        descendants = _descendants(started.pid)
        assert len(descendants) >= settings.QUICK.processes
        started.kill()
        started.wait()
        _wait(lambda: not any(_runs(process) for process in descendants))
    finally:
        for process in [*descendants, started.pid]:
            if _runs(process):
                os.kill(process, signal.SIGKILL)


def _wait(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 500  # on a busy machine the first line of the log takes minutes
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def _descendants(process: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return found + [further for child in found for further in _descendants(child)]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of a file is what a full disk is: the state cannot be written whole."""
    run = tmp_path / "run"
    run.mkdir()
    trainer = stages.Trainer(settings.QUICK, run, 0, 1)
    trainer.step = settings.QUICK.save_every - 1
    trainer.save()
    before = (run / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        arguments = ["--quick", "--out", str(tmp_path / "model"), "--run", str(run), "--resume"]
        assert command.main(arguments) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--resume continues" in capsys.readouterr().err
    assert (run / "state.pt").read_bytes() == before
    assert not list(run.glob("*.partial"))
    assert not (tmp_path / "model").exists()


def test_runs_of_other_seeds_begin_elsewhere_and_see_other_pictures(tmp_path: Path) -> None:
    assert max(settings.FULL.language_steps, settings.FULL.vision_steps) * 2 * 32 < stages.NUMBERS_PER_SEED
    one, other = (stages.Trainer(replace(_SMALL, seed=seed), tmp_path, 0, 1) for seed in (0, 1))
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))
    full = settings.FULL  # the third stage draws its own numbers, of the seed's own
    assert full.language_steps * full.processes * full.language_batch < stages.LOOKING_NUMBERS
    assert stages.LOOKING_NUMBERS + full.looking_steps * full.looking_batch < stages.NUMBERS_PER_SEED
    for stage in (0, 1, 2):
        lessons = [
            stages._Lessons(replace(_SMALL, seed=seed), one.processor.tokenizer, stage, 0, 0, 1) for seed in (0, 1)
        ]
        first, second = (next(iter(each)) for each in lessons)
        pixels = [each[0] if stage == 0 else each.pixels for each in (first, second)]
        assert not torch.equal(*pixels)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = command.importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name, *rest: None if name == "easy_vqa" else find(name, *rest)
    )
    assert command.main(["--out", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "easy_vqa" in said
    assert "[train]'" in said
    assert issubclass(MissingExtraError, Exception)


def _metrics(accuracy: float) -> dict[str, object]:
    row = {"accuracy": accuracy, "auroc": 0.9, "calibration_error": 0.1, "mean_confidence": 0.9}
    sets = {"held_out": {"questions": 1, "question_only": 0.1, "types": {}, "direct": row, "reasoned": row}}
    return {"sets": sets, "bytes": 1, "parameters": 1, "load_seconds": 0.1, "sha256": "0"}


def test_a_better_checkpoint_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    monkeypatch.setattr(stages, "train", lambda recipe, run, resume, start: "model")
    monkeypatch.setattr(checkpoint, "build_processor", lambda recipe: "processor")
    monkeypatch.setattr(checkpoint, "export", lambda m, p, folder: (folder / "model.safetensors").write_text(str(m)))
    measured = [0.8, 0.7, 0.7, 0.9]
    monkeypatch.setattr(evaluate, "measure_quick", lambda folder: _metrics(measured.pop(0)))
    arguments = ["--quick", "--out", str(out), "--run", str(run)]

    def accuracy() -> float:
        return json.loads((out / "metrics.json").read_text())["sets"]["held_out"]["direct"]["accuracy"]

    assert command.main(arguments) == 0
    assert command.main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert accuracy() == 0.8
    assert command.main([*arguments, "--force"]) == 0
    assert accuracy() == 0.7
    assert command.main(arguments) == 0
    assert accuracy() == 0.9
    (out / "metrics.json").unlink()
    assert command.main(arguments) == 2
    assert "never measured" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_quick_recipe_beats_the_question_only_baseline(tmp_path: Path) -> None:
    assert command.main(["--quick", "--out", str(tmp_path / "model"), "--run", str(tmp_path / "run")]) == 0
    row = json.loads((tmp_path / "model" / "metrics.json").read_text())["sets"]["held_out"]
    best = max(row["direct"]["accuracy"], row["reasoned"]["accuracy"])
    assert best > row["question_only"] + 0.2
    assert (tmp_path / "model" / "README.md").read_text().startswith("---")


# --- measurements ----------------------------------------------------------------------------------------------


def test_a_window_is_asked_about_as_a_further_picture(shipped: evaluate.Answerer) -> None:
    (canvas,) = asked_of.canvas_items(1, 3.0, first_seed=2_000_000)
    (near,) = asked_of.canvas_items(1, 3.0, first_seed=2_000_000, shown="scene")
    (other,) = asked_of.canvas_items(1, 3.0, first_seed=2_000_000, shown="elsewhere")
    assert canvas.text == near.text == other.text
    assert [len(item.pictures) for item in (canvas, near, other)] == [1, 2, 2]
    scene = generate(2_000_000, "canvas", scale=3)
    assert near.pictures[1].size == tuple(round(scene.window[k + 2] - scene.window[k]) for k in (0, 1))
    assert not set(near.windows) & set(other.windows)
    assert shipped.prompt(near).startswith("<|user|><image><image>")
    together = shipped.replies([canvas, near, other])
    for item, reply in zip((canvas, near, other), together, strict=True):
        alone = shipped.replies([item])[0]
        assert alone.answer == reply.answer
        assert alone.probability == pytest.approx(reply.probability, abs=1e-3)


def test_what_cannot_be_told_has_no_other_answer() -> None:
    for kind in asked_of.STRANGE:
        items = asked_of.strange_items(kind, 24)
        assert {item.answer for item in items} == {looking.CANNOT_TELL}
        assert len({item.image.tobytes() for item in items}) > 3
    for item in asked_of.absent_items(20):
        assert item.answer == looking.CANNOT_TELL


def test_who_abstains_has_no_confidence() -> None:
    assert evaluate.Reply("red", "", 0.9).confidence == 0.9
    silent = evaluate.Reply(looking.CANNOT_TELL, "", 0.9)
    assert silent.abstains and silent.confidence == 0


def test_an_auroc_of_right_answers_only_is_null() -> None:
    item = asked_of.Item(Image.new("RGB", (9, 9)), "color", "what color is it?", "red")
    replies = [evaluate.Reply("red", "", 0.9), evaluate.Reply("red", "", 0.8)]
    row = evaluate._summary([item, item], replies, replies, lambda _: "red")
    assert row["direct"]["auroc"] is None
    assert "NaN" not in json.dumps(row)


# --- what ships ------------------------------------------------------------------------------------------------


def test_shipped_checkpoint_is_small_and_complete(shipped: evaluate.Answerer) -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 12e6
    tokenizer = shipped.processor.tokenizer
    for marker in checkpoint.SPECIAL_TOKENS:
        assert len(tokenizer(marker, add_special_tokens=False).input_ids) == 1
    for text in ("émile 😀 zürich", "\t 日本語\n", "a\u0000b", "0123456789"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).strip() == text.strip()
    assert shipped.model.config.image_seq_length == settings.CELLS


@pytest.mark.slow
def test_shipped_checkpoint_answers(shipped: evaluate.Answerer) -> None:
    """A smoke test far below the card's figures: 100 fresh questions, both ways."""
    items = asked_of.scene_items("held_out", 100, first_seed=5_000_000)
    for opened in ("", "<think>"):
        replies = shipped.replies(items, opened)
        assert np.mean([r.answer == i.answer for i, r in zip(items, replies, strict=True)]) > 0.8
        assert all(0 <= r.probability <= 1 for r in replies)
    assert all(r.reasoning for r in replies)


def test_batches_do_not_change_answers(shipped: evaluate.Answerer) -> None:
    items = asked_of.scene_items("held_out", 12, first_seed=5_860_000)
    together = shipped.replies(items, "<think>")
    for item, reply in zip(items, together, strict=True):
        alone = shipped.replies([item], "<think>")[0]
        assert alone.answer == reply.answer
        assert alone.probability == pytest.approx(reply.probability, abs=1e-3)


def test_model_card_is_generated_from_the_measurements() -> None:
    metrics = json.loads((EMBEDDED / "metrics.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    assert (EMBEDDED / "README.md").read_text() == card.render(metrics, settings.FULL)
    digest = evaluate.hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    assert metrics["sha256"] == digest


def test_card_says_when_a_target_is_missed() -> None:
    metrics = json.loads((EMBEDDED / "metrics.json").read_text())
    metrics["sets"]["held_out"]["direct"]["accuracy"] = metrics["sets"]["held_out"]["reasoned"]["accuracy"] = 0.5
    assert "| held-out scenes: at least 0.95 | 0.500 (direct) | **no** |" in card.render(metrics, settings.FULL)


def _looked() -> dict[str, Any]:
    """Measurements of a checkpoint of three stages."""
    metrics: dict[str, Any] = json.loads((EMBEDDED / "metrics.json").read_text())
    row = {"accuracy": 0.4, "cannot_tell": 0.3, "auroc": 0.8, "calibration_error": 0.05, "mean_confidence": 0.4}
    window = row | {"accuracy": 0.9}
    canvas = {"questions": 9, "alone": row, "with_window": window, "with_other_window": row}
    told = {"questions": 9, "direct": 0.99, "reasoned": 0.97}
    answered = {name: {"questions": 9, "direct": 0.001, "reasoned": 0.03} for name in metrics["sets"]}
    return metrics | {
        "stages": list(stages.STAGES),
        "canvases": {"1": canvas, "2": canvas, "4": canvas},
        "cannot_tell": {"photographs": told, "noise": told | {"direct": 0.5}},
        "false_cannot_tell": answered,
    }


def test_card_tells_what_the_third_stage_made() -> None:
    text = card.render(_looked(), settings.FULL)
    assert "3. **Looking**" in text and "says that it cannot tell (see below)" in text
    assert "| 2 | 9 | 0.400 | 0.900 | 0.400 | 0.300 / 0.300 | 0.050 / 0.050 |" in text
    assert "| noise | 9 | no | 0.500 / 0.970 |" in text
    assert "| canvases of 2 sides and more: the window gains at least 20 points | +50.0 at 2 | yes |" in text
    assert "| cannot tell where there is no answer: at least 0.95 | noise 0.500 | **no** |" in text
    assert "| cannot tell on held-out scenes: at most 0.02 | 0.030 | **no** |" in text
    of_two = {key: value for key, value in _looked().items() if key not in ("stages", "canvases")}
    text = card.render(of_two, settings.FULL)
    assert "Looking" not in text and "canvases of 2 sides" not in text and "unsure rather than silent" in text


def test_card_compares_with_a_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    metrics = json.loads((EMBEDDED / "metrics.json").read_text())
    metrics.pop("second_run", None)
    metrics["seed"] = 0
    second = json.loads(json.dumps(metrics)) | {"seed": 7, "sha256": "another"}
    second["sets"]["hard"]["direct"]["accuracy"] = metrics["sets"]["hard"]["direct"]["accuracy"] - 0.05
    (here / "metrics.json").write_text(json.dumps(metrics))
    (other / "metrics.json").write_text(json.dumps(second))
    arguments = ["--out", str(here), "--second-run", str(other)]

    assert command.main(arguments) == 0
    text = (here / "README.md").read_text()
    assert text == card.render(json.loads((here / "metrics.json").read_text()), settings.FULL)
    assert "`--seed 7`" in text and "| -5.0 / +0.0 |" in text
    assert "| another run: within 2 points on every set, both ways | hard scenes, direct -5.0 | **no** |" in text

    before = (here / "metrics.json").read_bytes()
    for broken, message in (
        (metrics, "holds the weights of"),
        (second | {"sets": {"hard": second["sets"]["hard"]}}, "was not asked the questions of"),
        ({key: value for key, value in second.items() if key != "seed"}, "does not say its seed"),
    ):
        (other / "metrics.json").write_text(json.dumps(broken))
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    (other / "metrics.json").write_text("{")
    assert command.main(arguments) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert (here / "metrics.json").read_bytes() == before
