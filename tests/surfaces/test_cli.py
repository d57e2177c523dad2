"""The command line as a user meets it: its exit code, its two streams, and the files it writes."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from command import apart, run
from pictures import draw_shapes
from PIL import Image
from typer.testing import CliRunner

from latent_tool.cli import app
from latent_tool.errors import SettingsError
from latent_tool.schema import ReasoningResult

QUESTION = "what color is the circle?"
IT_IS = "note: The embedded model is a small model of synthetic scenes; name a real one with --model.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_shapes().save(tmp_path / "shapes.png")
    return tmp_path


@pytest.mark.slow
def test_ask_for_people(folder: Path) -> None:
    done = apart("ask", "shapes.png", QUESTION, "--iterations", "2", "--overlay", "seen.png", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "red" in done.stdout
    assert "pooled probability" in done.stdout
    assert done.stderr == IT_IS
    assert "\x1b" not in done.stdout
    with Image.open(folder / "seen.png") as seen:
        assert min(seen.size) >= 150
    assert sorted(path.name for path in folder.iterdir()) == ["seen.png", "shapes.png"]


def test_ask_for_programs(folder: Path) -> None:
    done = run("ask", "shapes.png", QUESTION, "--iterations", "1", "--json", "--grounding", "--controls", folder=folder)
    assert done.returncode == 0, done.stderr
    result = ReasoningResult.model_validate_json(done.stdout)
    assert result.answer == "red"
    assert result.image_sizes == [(200, 150)]
    assert result.grounding is not None
    assert result.controls is not None
    assert result.usage is not None
    assert set(result.usage.seconds) >= {"images", "prefill", "search", "decode", "grounding"}


def test_a_sure_answer_needs_no_search_unless_it_is_asked_for(folder: Path) -> None:
    asked = ("ask", "shapes.png", QUESTION, "--iterations", "1", "--json")
    sure = ReasoningResult.model_validate_json(run(*asked, folder=folder).stdout)
    assert (sure.answer, sure.stop_reason, sure.trace) == ("red", "confident", [])
    searched = ReasoningResult.model_validate_json(run(*asked, "--always-search", folder=folder).stdout)
    assert (searched.answer, searched.stop_reason, len(searched.trace)) == ("red", "iterations", 2)


def test_below_the_threshold_the_exit_code_is_3_and_says_what_to_do(folder: Path) -> None:
    done = run("ask", "shapes.png", QUESTION, "--iterations", "0", "--min-confidence", "1", "--json", folder=folder)
    assert done.returncode == 3
    assert json.loads(done.stdout)["accepted"] is False
    told = run("ask", "shapes.png", QUESTION, "--iterations", "0", "--min-confidence", "1", folder=folder)
    assert told.returncode == 3
    assert "--budget thorough" in told.stderr


BAD_FILES = {
    "missing.png": None,
    "empty.png": b"",
    "text.png": b"this is no picture",
    "truncated.png": "cut",
    "wide.png": (30_000, 1),
}


@pytest.fixture
def bad_files(folder: Path) -> Path:
    (folder / "folder.png").mkdir()
    for name, content in BAD_FILES.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif isinstance(content, tuple):
            Image.new("RGB", content).save(folder / name)
    whole = (folder / "shapes.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    return folder


def no_vision(folder: Path) -> Path:
    """A checkpoint of a model that sees nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = folder / "text-only"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(model)
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        *[(name, QUESTION) for name in [*BAD_FILES, "folder.png", "https://example.org/x.png", "/dev/zero"]],
        ("shapes.png", ""),
        ("shapes.png", "why? " * 20_000),
        ("shapes.png", QUESTION, "--iterations", "-1"),
        ("shapes.png", QUESTION, "--deadline", "nan"),
        ("shapes.png", QUESTION, "--deadline", "0"),
        ("shapes.png", QUESTION, "--max-new-tokens", "0"),
        ("shapes.png", QUESTION, "--latents", "300"),
        ("shapes.png", QUESTION, "--min-confidence", "2"),
        ("shapes.png", QUESTION, "--min-confidence", "nan"),
        ("shapes.png", QUESTION, "--min-confidence", "high"),
        ("shapes.png", QUESTION, "--budget", "huge"),
        ("shapes.png", QUESTION, "--seed", "-3"),
        ("shapes.png", QUESTION, "--model", "./no-such-model"),
        ("shapes.png", QUESTION, "--model", "text-only"),
        ("shapes.png", QUESTION, "--dtype", "int8"),
        ("shapes.png", QUESTION, "--overlay", "no-such-folder/seen.png"),
        ("shapes.png", QUESTION, "--overlay", "seen.txt"),
        ("shapes.png",),
    ],
    ids=lambda arguments: " ".join(arguments)[:50],
)
def test_bad_input_is_one_clear_error(
    bad_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """In one process, so that the next question shows that nothing was left broken."""
    from latent_tool.cli import main

    no_vision(bad_files)
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "argv", ["latent-tool", "ask", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "rror" in captured.err
    assert "what to do" in captured.err or "Invalid value for" in captured.err or len(arguments) == 1
    for python in ("Known fields", "deadline_s", "constrained", "hosts of the image policy"):
        assert python not in captured.err
    done = CliRunner().invoke(app, ["ask", "shapes.png", QUESTION, "--iterations", "0"])
    assert done.exit_code == 0
    assert "red" in done.stdout


def test_paper_without_latents_is_the_plain_model(folder: Path) -> None:
    done = run("ask", "shapes.png", QUESTION, "--preset", "paper", "--latents", "0", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert ReasoningResult.model_validate_json(done.stdout).scores.reward is None


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_encoding_of_the_output_will_do(folder: Path, encoding: str) -> None:
    """The name of the overlay has characters that the first two lack. Python itself reads the variables once."""
    arguments = ("ask", "shapes.png", QUESTION, "--iterations", "0", "--overlay", "gesehen-\N{SNOWMAN}.png")
    ask = apart if encoding == "cp1252" else run
    done = ask(*arguments, folder=folder, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "red" in done.stdout and done.stderr == IT_IS
    assert ("#" * 19 in done.stdout) is (encoding != "utf-8")
    done = run(*arguments, "--json", folder=folder, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert ReasoningResult.model_validate_json(done.stdout).answer == "red"


def test_json_has_escapes_where_the_output_has_no_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_tool.commands import ask

    result = ReasoningResult(answer="é☃", raw_text="é☃", confidence=None, confidence_source="unscored")
    for encoding in ("ascii", "latin-1", "utf-8"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        text = ask._json(result)
        assert ReasoningResult.model_validate_json(text.encode(encoding)) == result
        assert ("☃" in text) is (encoding == "utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["people", "json"])
def test_an_output_that_cannot_be_written_is_an_error(folder: Path, options: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = apart("ask", "shapes.png", QUESTION, "--iterations", "0", *options, folder=folder, stdout=full)
    assert done.returncode == 1
    assert "error: The result cannot be written to standard output (No space left on device)." in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_every_overlay_can_be_written_before_the_search_begins(folder: Path) -> None:
    (folder / "seen-1.png").mkdir()
    done = run("ask", "shapes.png", QUESTION, "--also", "shapes.png", "--overlay", "seen.png", folder=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert "'seen-1.png' cannot be written" in done.stderr
    assert not (folder / "seen.png").exists()


def test_the_answer_is_told_when_a_file_cannot_be_written_after_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is gone by then."""
    from latent_tool.commands import ask

    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    follow = ask._follow

    def and_remove(*arguments: object) -> ReasoningResult:
        result = follow(*arguments)
        (folder / "out").rmdir()
        return result

    monkeypatch.setattr(ask, "_follow", and_remove)
    done = CliRunner().invoke(app, ["ask", "shapes.png", QUESTION, "--iterations", "0", "--overlay", "out/seen.png"])
    assert isinstance(done.exception, SettingsError) and "cannot be written" in done.exception.message
    assert "red" in done.stdout and "written" not in done.stdout


def test_a_traceback_never_reaches_the_user(bad_files: Path) -> None:
    done = apart("ask", "truncated.png", QUESTION, folder=bad_files)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_control_characters_do_not_reach_the_terminal(folder: Path) -> None:
    done = run("ask", "\x1b]0;title\x07.png", QUESTION, folder=folder)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


def test_the_report_is_written_and_named(folder: Path) -> None:
    done = run(
        *("ask", "shapes.png", QUESTION, "--iterations", "1", "--report", "why.html"),
        *("--grounding", "--controls", "--min-confidence", "0"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "why.html" in done.stdout
    page = (folder / "why.html").read_text(encoding="utf-8")
    for part in (QUESTION, "shapes.png", "latents off", "How much each token depends", "✓ accepted", "seed"):
        assert part in page, part
    refused = run("ask", "shapes.png", QUESTION, "--report", "why.txt", folder=folder)
    assert refused.returncode == 2 and "does not end in .html" in refused.stderr


HOSTILE_NAME = "\x1b]0;title\x07[red]<img src=x onerror=alert(1)>.png"
HOSTILE_QUESTION = "[bold]\x1b[2J</script><script>alert(1)</script> what color is the circle?"


def test_the_heat_map_measures_what_it_shows(folder: Path) -> None:
    done = run(
        *("ask", "shapes.png", QUESTION, "--iterations", "1", "--always-search", "--json"),
        *("--overlay", "seen.png", "--heatmap", "heat.png", "--report", "why.html"),
        folder=folder,
    )
    assert done.returncode == 0 and done.stderr == IT_IS, done.stderr
    result = ReasoningResult.model_validate_json(done.stdout)
    assert result.attention is not None and len(result.attention) == 64
    with Image.open(folder / "seen.png") as seen, Image.open(folder / "heat.png") as heat:
        assert seen.width == heat.width and seen.tobytes() != heat.tobytes()
    assert "attention=True" in (folder / "why.html").read_text(encoding="utf-8")
    plain = run("ask", "shapes.png", QUESTION, "--latents", "0", "--heatmap", "heat.png", folder=folder)
    assert plain.returncode == 0 and "no attention to the image cells" in plain.stderr
    refused = run("ask", "shapes.png", QUESTION, "--heatmap", "heat.jpg", folder=folder)
    assert refused.returncode == 2 and "does not end in .png" in refused.stderr
    both = run("ask", "shapes.png", QUESTION, "--overlay", "one.png", "--heatmap", "one.png", folder=folder)
    assert both.returncode == 2 and "--heatmap and --overlay" in both.stderr and not (folder / "one.png").exists()


def test_hostile_names_and_questions_stay_text(folder: Path) -> None:
    (folder / "shapes.png").rename(folder / HOSTILE_NAME)
    done = run(
        *("ask", HOSTILE_NAME, HOSTILE_QUESTION, "--iterations", "0", "--quiet"),
        *("--overlay", f"seen{HOSTILE_NAME}", "--report", f"{HOSTILE_NAME}.html"),
        folder=folder,
        FORCE_COLOR="1",
        COLUMNS="200",
    )
    assert done.returncode == 0, done.stderr
    plain = re.sub("\x1b\\[[0-9;]*m", "", done.stdout + done.stderr)  # colours are Rich's own
    assert "\x1b" not in plain and "\x07" not in plain
    assert "[red]<img src=x" in plain
    page = (folder / f"{HOSTILE_NAME}.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "<img" not in page and "\x1b" not in page
    assert (folder / f"seen{HOSTILE_NAME}").is_file()


def test_json_is_the_same_with_and_without_colours(folder: Path) -> None:
    arguments = ("ask", "shapes.png", QUESTION, "--iterations", "0", "--json", "--min-confidence", "1")
    told, coloured = run(*arguments, folder=folder), run(*arguments, folder=folder, FORCE_COLOR="1", COLUMNS="20")
    assert "\x1b" not in coloured.stdout
    first, second = (json.loads(each.stdout) for each in (told, coloured))
    for each in (first, second):
        each["usage"].pop("seconds")
        [row.pop("seconds") for row in each["trace"]]
    assert first == second


def test_several_images_each_have_an_overlay(folder: Path) -> None:
    draw_shapes("triangle").save(folder / "second.png")
    done = run(
        *("ask", "shapes.png", "what color is the square?", "--also", "second.png"),
        *("--iterations", "0", "--overlay", "seen.png", "--json"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["image_sizes"]) == 2
    assert (folder / "seen.png").is_file()
    assert (folder / "seen-1.png").is_file()


def test_help_and_version(folder: Path) -> None:
    assert "--min-confidence" in run("ask", "--help", folder=folder, COLUMNS="120").stdout
    assert run("--version", folder=folder).stdout.startswith("latent-tool 0.")
    assert run("--help", folder=folder).returncode == 0


def test_help_shows_the_common_options_first_and_flags_as_flags(folder: Path) -> None:
    shown = run("ask", "--help", folder=folder, COLUMNS="120").stdout
    assert "<bool>" not in shown
    common, *panels = re.split("╭─ (?!Arguments|Options)", shown)
    assert [panel.partition(" ─")[0] for panel in panels] == [
        "How the search works",
        "What is measured besides",
        "Model",
    ]
    for option in ("--model", "--budget", "--min-confidence", "--overlay", "--json"):
        assert option in common
    for command in ("eval", "calibrate", "study", "mcp", "serve", "play", "models"):
        assert "<bool>" not in run(command, "--help", folder=folder, COLUMNS="120").stdout


@pytest.mark.parametrize("columns", ["50", "80", "200"])
def test_ids_of_models_are_never_broken(folder: Path, columns: str) -> None:
    from latent_tool.models.families import supported

    shown = run("models", folder=folder, COLUMNS=columns).stdout
    for row in supported():
        assert row.example in shown.split() and row.note in shown


def test_patches_are_summed_up(folder: Path) -> None:
    asked = ("ask", "shapes.png", QUESTION, "--iterations", "4", "--always-search", "--seed", "1")
    short, every = (run(*asked, *more, folder=folder).stdout for more in ((), ("--patches",)))
    count = len(json.loads(run(*asked, "--json", folder=folder).stdout)["patches"])
    assert len(every.splitlines()) >= len(short.splitlines()) + count
    assert (f"{count} injected" in short) is (count > 0) and "injected" not in every


def aliases(folder: Path) -> dict[str, str]:
    """Other names of the picture."""
    (folder / "link.png").symlink_to("shapes.png")
    os.link(folder / "shapes.png", folder / "hard.png")
    (folder / "inner").mkdir()
    return {
        "itself": "shapes.png",
        "relative": "inner/../shapes.png",
        "absolute": str(folder / "shapes.png"),
        "link": "link.png",
        "hard link": "hard.png",
    }


@pytest.mark.parametrize("name", ["itself", "relative", "absolute", "link", "hard link"])
@pytest.mark.parametrize("option", ["--overlay", "--heatmap"])
def test_what_is_read_is_never_written(folder: Path, name: str, option: str) -> None:
    other = aliases(folder)[name]
    before = (folder / "shapes.png").read_bytes()
    for asked in (("shapes.png", option, other), (other, option, "shapes.png")):
        done = CliRunner().invoke(app, ["ask", str(folder / asked[0]), QUESTION, asked[1], str(folder / asked[2])])
        assert isinstance(done.exception, SettingsError), done.output
        assert option in done.exception.message and "is read" in done.exception.message
        assert done.stdout == "" and (folder / "shapes.png").read_bytes() == before


def test_numbered_outputs_hit_neither_an_input_nor_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    draw_shapes().save("seen-1.png")
    for arguments in (
        ("shapes.png", "--also", "seen-1.png", "--overlay", "seen.png"),
        ("shapes.png", "--also", "./seen-1.png", "--heatmap", "seen.png"),
        ("shapes.png", "--also", "shapes.png", "--overlay", "a.png", "--heatmap", "a-1.png"),
        ("shapes.png", "--overlay", "a.png", "--heatmap", "./a.png"),
    ):
        done = CliRunner().invoke(app, ["ask", arguments[0], QUESTION, *arguments[1:]])
        assert isinstance(done.exception, SettingsError), done.output
        assert not {"a.png", "a-1.png", "seen.png"} & {path.name for path in folder.iterdir()}
    (folder / "page.html").write_bytes((folder / "shapes.png").read_bytes())
    done = CliRunner().invoke(app, ["ask", "page.html", QUESTION, "--report", "page.html"])
    assert isinstance(done.exception, SettingsError) and "--report" in done.exception.message


def test_a_picture_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files are made of it."""
    from latent_tool.images import load

    decoded = []
    decode = load._decode
    monkeypatch.setattr(load, "_decode", lambda *given, **more: decoded.append(given) or decode(*given, **more))
    monkeypatch.chdir(folder)
    outputs = ("--overlay", "seen.png", "--heatmap", "heat.png", "--report", "why.html")
    done = CliRunner().invoke(app, ["ask", "shapes.png", QUESTION, "--iterations", "0", *outputs])
    assert done.exit_code == 0, done.output
    assert len(decoded) == 1


def test_doctor(folder: Path) -> None:
    done = run("doctor", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and {"loading", "prefix cache", "boxes", "speed"} <= {
        each["check"] for each in report["findings"]
    }
    assert "prefix cache" in done.stderr  # progress, line by line
    missing = run("doctor", "--model", str(folder / "nothing"), folder=folder)
    assert missing.returncode == 1
    assert "no model directory" in missing.stdout and "save_pretrained" in missing.stdout


def test_models_that_fit() -> None:
    runner = CliRunner()
    whole = json.loads(runner.invoke(app, ["models", "--json"]).stdout)
    assert len(whole) == 18 and all(row["checkpoints"] and row["as_of"] == "2026-11" for row in whole)
    assert all(row["example"] in [each["model"] for each in row["checkpoints"]] for row in whole)
    small = json.loads(runner.invoke(app, ["models", "--json", "--fits", "8GB"]).stdout)
    fitting = {each["model"]: each["fits"] for row in small for each in row["checkpoints"]}
    assert fitting["Qwen/Qwen3-VL-2B-Instruct"] == "bf16" and fitting["Qwen/Qwen2.5-VL-7B-Instruct"] == "4bit"
    assert "google/gemma-3-27b-it" not in fitting
    checked = {each["model"]: each["checked"] for row in whole for each in row["checkpoints"]}
    assert checked["Qwen/Qwen3-VL-8B-Instruct"] and not checked["llava-hf/llava-1.5-7b-hf"]
    listed = runner.invoke(app, ["models"], env={"COLUMNS": "80"}).stdout
    assert "~7.1 B" in listed and "    8.8 B" in listed and "from memory" in listed
    shown = runner.invoke(app, ["models", "--fits", "8GB"]).stdout
    assert "Qwen/Qwen3-VL-2B-Instruct" in shown and "gemma-3-27b" not in shown
    assert "No model" in runner.invoke(app, ["models", "--fits", "1MB"]).stdout
    with pytest.raises(SettingsError, match="no size"):
        runner.invoke(app, ["models", "--fits", "much"], catch_exceptions=False)
