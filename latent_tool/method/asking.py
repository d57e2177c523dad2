"""How work asks for what it cannot compute: it awaits requests, and one driver hands it the replies.

The search, and everything else that a question does, needs a model's forward passes, and passes are cheapest when
those of many questions run in one batch. So work never calls the model. It awaits a request, which suspends it with
the request in hand; whoever drives the work serves the request, alone or together with those of other work, and hands
the reply over. There is no event loop, no thread and no future: ``async`` and ``await`` are only the notation for "stop
here until somebody has the reply", and a type checker knows the type of every reply.

    @dataclass(frozen=True)
    class Square(Request[int]):
        number: int

    async def work() -> int:
        return await Square(3) + await Square(4)

    asking = Asking(work())                    # runs up to the first request
    while asking.request is not None:
        asking.advance(asking.request.number ** 2)
    asking.outcome()                           # 25

``Asking`` is the only driver: ``engine.in_step`` keeps a list of them, and one question alone is a list of one.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Asking", "Request", "Work", "all_or_error", "contained"]

R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Request(Generic[R]):
    """Something that work asks for; ``await request`` gives the reply, an ``R``."""

    def __await__(self) -> Generator[Request[R], R, R]:
        return (yield self)


# A coroutine that awaits nothing but requests, and returns a ``T``.
Work = Coroutine[Request[Any], object, T]


class Asking(Generic[T_co]):
    """Work under way: the request it waits for, or, once that is ``None``, what it ended with."""

    def __init__(self, work: Work[T_co]) -> None:
        self._work = work
        self.request: Request[Any] | None = None
        self.result: T_co | Exception | None = None
        self.advance(None)

    def advance(self, reply: object) -> None:
        """Hand over the reply to ``request``, and go on to the next request or to the end.

        A reply that is an ``Exception`` is raised inside the work, which may handle it.
        """
        self.request = None
        try:
            self.request = self._work.throw(reply) if isinstance(reply, Exception) else self._work.send(reply)
        except StopIteration as end:
            self.result = end.value
        except BaseException as error:
            self.result = contained(error)
        finally:
            del self  # the traceback in the result must not lead back to it: that would keep tensors alive

    def close(self) -> None:
        """Give up what is left of the work."""
        self._work.close()

    def ended(self) -> T_co | Exception:
        """Return what the work returned, or the exception it ended with."""
        if self.result is None:
            raise RuntimeError("The work has not ended.")
        return self.result

    def outcome(self) -> T_co:
        """Return what the work returned, or raise what it raised."""
        result = self.ended()
        try:
            if isinstance(result, Exception):
                raise result
            return result
        finally:
            del self, result  # as above


def all_or_error(replies: Iterable[T | Exception]) -> list[T] | Exception:
    """Return the replies to the parts of one request, or the first error among them."""
    whole: list[T] = []
    for reply in replies:
        if isinstance(reply, Exception):
            return reply
        whole.append(reply)
    return whole


def contained(error: BaseException) -> Exception:
    """Return an error as one that a single piece of work can end with; raise again what ends the whole thread.

    Tokenizers written in Rust raise their panics past ``except Exception``.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
