"""A small model is computed with one thread, and nothing of that is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from pictures import draw_shapes

from latent_tool.engine.engine import Engine, use_threads
from latent_tool.engine.job import Job
from latent_tool.models import threads
from latent_tool.models.threads import one_thread


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that computes with three threads, and in which nobody has chosen a number."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_process", threads._Threads())
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_inside_and_as_before_outside() -> None:
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert threads._process.inside == 1
        raise ZeroDivisionError
    assert (torch.get_num_threads(), threads._process.inside) == (3, 0)


def test_whoever_comes_out_last_leaves_it_as_it_was() -> None:
    first_in, second_out = threading.Event(), threading.Event()
    seen: list[int] = []

    def first() -> None:
        with one_thread():
            first_in.set()
            assert second_out.wait(30)
        seen.append(torch.get_num_threads())

    other = threading.Thread(target=first)
    other.start()
    assert first_in.wait(30)
    with one_thread():
        seen.append(torch.get_num_threads())
    second_out.set()
    other.join()
    assert seen == [1, 3] and torch.get_num_threads() == 3


def test_a_number_that_was_chosen_is_left_alone() -> None:
    use_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 2
    with one_thread():
        use_threads(3)
    assert torch.get_num_threads() == 3


def test_the_embedded_model_computes_with_one_thread(engine: Engine) -> None:
    """In its forward passes, and where its processor works on the picture."""
    seen: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        for module in (engine.vlm.model.get_decoder(), engine.vlm.model.model.vision_tower)
    ]
    try:
        engine.answer(Job((draw_shapes("triangle", (9, 90, 200)),), "what color is the triangle?"))
    finally:
        for handle in handles:
            handle.remove()
    assert engine.vlm.small and len(seen) > 2 and set(seen) == {1}
    assert torch.get_num_threads() == 3
