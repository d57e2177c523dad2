"""What a model is called, and what is left of this machine's paths, where others read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latent_tool.about import model_name, what_it_is
from latent_tool.words import without_places


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("embedded", "embedded"),
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        ("checkpoints/mine", "checkpoints/mine"),
        ("/home/ann/models/mine", "mine"),
        ("/home/ann/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("../../models/mine", "mine"),
        ("./mine", "mine"),
        (r"C:\Users\ann\mine", "mine"),
        (r"\\server\share\mine", "mine"),
        ("/home/ann/embedded", "embedded (a folder)"),
        ("/", " (a folder)"),
    ],
)
def test_a_model_is_called_by_its_name(model: str, name: str) -> None:
    assert model_name(model) == name
    assert (what_it_is(model_name(model)) is not None) == (model == "embedded")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The directory '/tmp/a b/mine' holds no model.", "The directory 'mine' holds no model."),
        ("cannot read /tmp/x/y.json: gone", "cannot read y.json: gone"),
        ('open("/usr/lib/z")', 'open("z")'),
        (r"'C:\Users\ann\mine' is gone", "'mine' is gone"),
        ("'~/mine' is gone", "'mine' is gone"),
        ("Ask POST /v1/ask, see /openapi.json", "Ask POST /v1/ask, see /openapi.json"),
        ("https://example.org/usr/lib and http://127.0.0.1:8000/tmp/x", None),
        ("Qwen/Qwen3 and 1/2 and ./a/b", None),
        ("'/v1/ask' is known", None),
        ("see '/mcp', /health or /v1/ask/stream", None),
        ("There is no model directory /data9/ann/secret/model.", "There is no model directory model."),
        ("no '/data9/ann/secret/model'", "no 'model'"),  # wherever it is a folder
        ("/v1/ask/of/ann/x", "x"),
        ("file:///home/ann/x/y and FILE://localhost/home/ann/z", "y and z"),
        ("'file:///home/ann/x/y', file:/home/ann/z", "'y', z"),
        ("sqlite:////home/ann/x.db, s3://bucket/a/b", "x.db, s3://bucket/a/b"),
        ("http://[::1]:80/tmp/x /home/ann/y", "http://[::1]:80/tmp/x y"),
        (r"at C:\Users\ann\m, C:/Users/ann/n, \\server\ann\o", "at m, n, o"),
        ("in ~/ann/x or ~ann/x/y", "in x or y"),
        ("cannot read /home/ann smith/x/y.json: gone", "cannot read y.json: gone"),
        (r"C:\Users\ann smith\m.json", "m.json"),
        ("/home/ann maria smith/x and POST /v1/ask", "x and POST /v1/ask"),
        ("\"/home/ann o'brien/x/y\" or /home/ann o'brien/x/z", '"y" or z'),
        ("it's '/home/o'brien/x' and it's", "it's 'x' and it's"),
        ("path=/home/ann/x, Error:/home/ann/y, (/home/ann/z)", "path=x, Error:y, (z)"),
        ("text/plain, and/or/else, a / b / c, </p></div>", None),
        # Behind a letter, colours, escapes that were written out.
        ("-I/home/me/inc/x and -I/data9/me/x", "-Ix and -Ix"),
        ("\x1b[31m/home/me/x\x1b[0m and \\x1b[1;31m/data9/me/x", "x and x"),
        ("line1\\n/home/me/x line2\\r/data9/me/y", "line1\\ny"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}/home/me", "\N{LATIN SMALL LETTER E WITH ACUTE}me"),
        (r"\home\me\x", "x"),
        (r"xC:\Users\me\a and 'C:\\Users\\me\\b'", "xa and 'b'"),
        ("%2Fhome%2Fme and C%3A%5CUsers%5Cme%5Cx.png", "me and x.png"),
        ("f'/data9/me/x', b\"/data9/me/y\"", "f'x', b\"y\""),
        ("f'/data9/me/x and word'/data9/me/x and f'~/me/x, f'C:\\me\\x", "f'x and word'x and f'x, f'x"),
        (repr(r"at \\server\ann\x"), "'at x'"),
        # Folders of many words.
        ("/home/John Q Public Esq/x.png", "x.png"),
        ("/home/me/Doe, John/x.png", "x.png"),
        ("/home/me/my  folder/x.png", "x.png"),
        (r"C:\Users\John Q Public Esq\x.png", "x.png"),
        (r"C:\Program Files (x86)\ann\x", "x"),
        ("/home/me/a.png, use png and/or jpg", "a.png, use png and/or jpg"),
        ("no /home/me/model is there, use a/b", "no model is there, use a/b"),
        # What is no path.
        ("~1/2 cup, the image ~3/4 down", None),
        ("A:/left B:/right", None),
        ("Is it /red/? Is it /red/", None),
        ("\"yes\"/\"no\" or 'yes'/'no'/'maybe'", None),
        ("DELETE /v1/questions/123", None),
        ("Send it to /v1/ask.", None),
        ("Write file:///folder/name.png, file:///folder URLs.", None),
    ],
)
def test_paths_of_this_machine_are_left_out(text: str, left: str | None) -> None:
    assert without_places(text) == (text if left is None else left)


def test_the_servers_routes_are_no_places() -> None:
    pattern = re.compile(r"""(?:@app\.\w+\(|Route\(|PATH =|open_paths=\(|Error\()\s*"(/[^"]*)\"""")
    integrations = Path(__file__).parents[2] / "integrations"
    routes = {route for file in integrations.glob("*.py") for route in pattern.findall(file.read_text("utf-8"))}
    assert {"/v1/ask", "/v1/ask/form", "/v1/ask/stream", "/health", "/metrics", "/mcp"} <= routes
    for route in routes:
        for text in (f"Ask {route} instead", f"'{route}' is known"):
            assert without_places(text) == text


@pytest.mark.parametrize("part", ["/", "~", "/a", "a ", "/a a", "'/", "a:", "/a ", "file:", "a://", "\\", "/a'", "/a,"])
def test_any_text_is_read_once(part: str) -> None:
    """Text that is read again from every place would take hours."""
    without_places(part * 200_000)
    without_places("/" + "a" * 200_000 + part)


@pytest.mark.parametrize(
    "part",
    [
        *(
            "'c:/ ",
            "'c:/ \"",
            "\"/a '",
            "\"~/ '",
            "/home/A B C, D ",
            "/home/a, ",
            "/a)",
            "/a(",
            " -I/a/b",
            "\\n/a",
            "/v1/",
        ),
        *("%2Fhome%2Fa", "\x1b[", "\x1b[1", "~a.", "c:\\", "\\\\a", "file:///a B ", "a+", "://"),
    ],
)
def test_no_more_is_read_than_a_person_would(part: str) -> None:
    """However often a path may begin in it, of a long text as much is read as of a short one."""
    assert len(without_places(part * 100_000)) <= 12_000
    assert without_places(part * 100_000) == without_places(part * 10_000)


@pytest.mark.parametrize("path", ["/home/secret/x", "'/data9/secret name/x'", "~/secret/x", r"C:\Users\secret\x"])
def test_a_cut_leaves_no_part_of_a_path(path: str) -> None:
    for before in range(9_980, 10_010):
        left = without_places(" " * before + path + " and more" * 1000)
        assert "secret" not in left and left.endswith(" […]")
    assert "secret" not in without_places(" " * 9_990 + "/home/" + "secret" * 1000 + "/x")


def test_what_is_short_is_not_cut() -> None:
    assert without_places("word " * 2_000) == "word " * 2_000
