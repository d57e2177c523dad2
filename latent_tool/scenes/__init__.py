"""The synthetic world of the embedded model: pictures, questions, answers, true reasoning and relevant boxes.

``generate(seed, split)`` draws one picture (coloured shapes, printed characters or a bar chart, now and then
nothing at all) and asks questions about it. Everything is decided by ``(seed, split)`` alone, so a data set is
a range of seeds:

* ``"train"``     what the shipped model was trained on;
* ``"held_out"``  the same distribution, from a stream of random numbers that training never touches;
* ``"hard"``      more and smaller objects, longer numbers, crowded charts, and colour-shape combinations
  (``UNSEEN_COMBINATIONS``) that occur in no training picture and in no training question;
* ``"canvas"``    a scene like the held-out ones among other things on a canvas of ``scale`` times its sides, so that
  its details are too small to see at once; ``Scene.window`` says where it lies.

Boxes are ``(left, top, right, bottom)`` in pixels of ``Scene.image``. ``Question.boxes`` holds what the answer
rests on; it is empty when nothing in the picture does (``is there a star?`` - ``no``).

    world       colours, shapes, what an object, a question and a scene are
    wording     templates and synonyms
    drawing     backgrounds, colours, camera artefacts
    shapes      scenes of coloured shapes
    asking      the questions about them
    text        scenes of printed characters, with their questions
    bars        bar charts, with their questions
    canvas      a scene among other things on a larger canvas
    generator   (seed, split) -> scene

The package needs Pillow and numpy alone. It knows nothing of models, tokens, cells or training.
"""

from latent_tool.scenes.bars import bar_questions
from latent_tool.scenes.canvas import compose
from latent_tool.scenes.generator import generate
from latent_tool.scenes.wording import plural
from latent_tool.scenes.world import (
    CHARACTERS,
    COLORS,
    QUESTION_TYPES,
    SEEDS_PER_SPLIT,
    SHAPES,
    UNSEEN_COMBINATIONS,
    Assets,
    Box,
    Question,
    Scene,
    SceneKind,
    SceneObject,
    Split,
    location,
    tenths,
)

__all__ = [
    "CHARACTERS",
    "COLORS",
    "QUESTION_TYPES",
    "SEEDS_PER_SPLIT",
    "SHAPES",
    "UNSEEN_COMBINATIONS",
    "Assets",
    "Box",
    "Question",
    "Scene",
    "SceneKind",
    "SceneObject",
    "Split",
    "bar_questions",
    "compose",
    "generate",
    "location",
    "plural",
    "tenths",
]
