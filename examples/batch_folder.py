"""The same question about every picture in a folder; what cannot be opened is reported, the rest goes on."""

import sys
from pathlib import Path

from latent_tool import LatentReasoner


def main(folder: Path, question: str) -> None:
    reasoner = LatentReasoner(budget={"iterations": 1}, min_confidence=0.9)
    pictures = sorted(folder.iterdir())
    requests = [{"image": picture, "question": question} for picture in pictures]
    answers = reasoner.batch(requests, {"max_concurrency": 4}, return_exceptions=True)
    for picture, answer in zip(pictures, answers, strict=True):
        if isinstance(answer, Exception):
            print(f"{picture.name:20} cannot be read: {answer}")
        else:
            sure = "" if answer.accepted else "  <- not sure"
            print(f"{picture.name:20} {answer.answer:15} {answer.confidence:.3f}{sure}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0]) if given else Path(__file__).parent / "images",
        given[1] if len(given) > 1 else "how many shapes are there?",
    )
