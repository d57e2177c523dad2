"""LCEL: prompt | reasoner | parser, and the same with the chat model."""

from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from PIL import Image

from latent_tool import ChatLatentReasoner, LatentReasoner, ReasoningResult
from latent_tool.langchain.messages import image_block

PICTURE = Path(__file__).parent / "images" / "shapes.png"


def headline(result: ReasoningResult) -> str:
    """The result in one line."""
    return f"{result.answer} ({result.confidence:.0%} sure, {len(result.patches)} patches)"


def main() -> None:
    prompt = ChatPromptTemplate.from_messages(
        [("human", [{"type": "image", "base64": "{png}", "mime_type": "image/png"}, "what color is the {shape}?"])]
    )
    reasoner = LatentReasoner(budget="quick")
    png = image_block(Image.open(PICTURE))["base64"]

    chain = prompt | reasoner | headline
    for answer in chain.batch([{"png": png, "shape": "circle"}, {"png": png, "shape": "square"}]):
        print("reasoner:  ", answer)

    chat = prompt | ChatLatentReasoner(reasoner=reasoner) | StrOutputParser()
    print("chat model:", "".join(chat.stream({"png": png, "shape": "circle"})))


if __name__ == "__main__":
    main()
