"""Route pictures by typed questions: a probability for every answer. Needs langchain-core 1.8 or newer."""

from pathlib import Path

from langchain_core.decisions import Choice, Noul
from PIL import Image

from latent_tool import LatentReasoner
from latent_tool.langchain.decisions import LatentDecisionModel
from latent_tool.langchain.messages import image_block

IMAGES = Path(__file__).parent / "images"
QUESTIONS = {
    "colour": Choice(instructions="what color is the circle?", criteria={"red": None, "green": None, "blue": None}),
    "circle": Noul(instructions="is there a circle?"),
}


def main() -> None:
    model = LatentDecisionModel(reasoner=LatentReasoner(budget="quick"))
    for name in ("shapes.png", "chart.png"):
        state = {"picture": image_block(Image.open(IMAGES / name))}
        response = model.invoke({"state": state, "questions": QUESTIONS})
        colour, circle = response.choices["colour"], response.nouls["circle"].noul
        mass = response.results["colour"].mass or 0.0  # small: none of the colours fits
        if circle >= 0.5 and mass >= 0.5 and colour.confidence >= 0.9:
            print(f"{name}: to the {colour.choice} shelf ({colour.confidence:.0%} sure)")
        else:
            print(f"{name}: to a person (a circle: {circle:.0%}, any of the colours: {mass:.0%})")


if __name__ == "__main__":
    main()
