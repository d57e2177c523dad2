"""Many questions answered on a Ray cluster, one engine per actor, with an output that goes on where it ended.

    answer_all(rows, LatentReasoner(), "answers.jsonl", actors=8, num_gpus=1)

A row has an ``id`` and the fields of a ``ReasoningRequest``; images are paths that every node can read, data URIs or
bytes. The file gets one line for every row, ``{"id", "result", "error"}``, as soon as it is answered. What is in the
file already is not asked again, so that a run that was stopped is continued by the same call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_tool.errors import InputError, LatentToolError, MissingExtraError
from latent_tool.reasoner import LatentReasoner

try:
    import ray
    import ray.data
except ImportError as error:
    raise MissingExtraError("Ray Data", "ray") from error

__all__ = ["answer_all", "read_answers"]


class Answerer:
    """An actor: one process with one engine, that answers a batch of rows in shared forward passes."""

    def __init__(self, reasoner: LatentReasoner) -> None:
        self.reasoner = reasoner
        reasoner.engine()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [json.loads(row) for row in batch["row"]]
        for row, image in zip(rows, batch["image"], strict=True):
            if image:
                row["image"] = bytes(image)
        asked = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        answers: list[Any] = self.reasoner.batch(asked, return_exceptions=True)
        return {"line": [_line(row["id"], answer) for row, answer in zip(rows, answers, strict=True)]}


def answer_all(
    rows: Iterable[Mapping[str, Any]],
    reasoner: LatentReasoner,
    out: str | Path,
    *,
    actors: int | tuple[int, int] = 1,
    batch_size: int = 16,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> int:
    """Answer the rows that are not in the file yet; gives how many those were.

    Args:
        rows: each with a unique text ``id`` and the fields of a request; an error of one is its answer.
        reasoner: who answers; every actor loads its model once.
        out: the file of lines.
        actors: how many, or the fewest and the most.
        batch_size: rows an actor answers together.
        num_cpus, num_gpus: what an actor takes.

    Raises ``InputError`` when a row has no id, or two have the same.
    """
    file = Path(out)
    done = {each["id"] for each in read_answers(file)}
    _cut_torn_line(file)
    left = [row for row in _with_ids(rows) if row["id"] not in done]
    if not left:
        return 0
    fewest, most = actors if isinstance(actors, tuple) else (actors, actors)
    answered = ray.data.from_items([_as_item(row) for row in left]).map_batches(
        Answerer,
        fn_constructor_kwargs={"reasoner": reasoner},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    with file.open("a", encoding="utf-8") as lines:
        for row in answered.iter_rows():
            lines.write(row["line"] + "\n")
            lines.flush()
    return len(left)


def read_answers(file: str | Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of answers; a last line that was torn off is left out."""
    path = Path(file)
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _cut_torn_line(file: Path) -> None:
    if file.exists():
        data = file.read_bytes()
        if not data.endswith(b"\n"):
            with file.open("r+b") as whole:
                whole.truncate(data.rfind(b"\n") + 1)


def _with_ids(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    seen = set()
    for number, row in enumerate(rows, 1):
        name = row.get("id")
        if not isinstance(name, str) or name in seen:
            raise InputError(f"Row {number} has no id of its own.", "Give every row a text 'id' that no other row has.")
        seen.add(name)
        yield dict(row)


def _as_item(row: dict[str, Any]) -> dict[str, Any]:
    """A row as Arrow can carry it: JSON text, and the bytes of an image beside it."""
    image = row.get("image")
    if isinstance(image, bytes):
        return {"row": json.dumps({**row, "image": None}), "image": image}
    return {"row": json.dumps(row, default=str), "image": b""}


def _line(name: str, answer: Any) -> str:
    if isinstance(answer, LatentToolError):
        result, error = None, {"type": type(answer).__name__, "message": answer.message, "hint": answer.hint}
    elif isinstance(answer, Exception):
        result, error = None, {"type": type(answer).__name__, "message": str(answer), "hint": ""}
    else:
        result, error = answer.model_dump(mode="json"), None
    return json.dumps({"id": name, "result": result, "error": error})
