"""Questions about coloured shapes: one method for each type, each answer true of what was drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from latent_tool.scenes.drawing import Context
from latent_tool.scenes.wording import article, expand, plural
from latent_tool.scenes.world import COLORS, SHAPES, Box, Question, SceneObject, location, tenths

_MARGIN = 0.075  # two positions nearer than this share of the canvas are not told apart
_SIZE_RATIO = 1.35  # two areas nearer than this are not told apart
_DIRECTIONS: dict[str, tuple[int, int, str]] = {
    "left": (0, -1, "{to the left of|left of|on the left of|on the left side of}"),
    "right": (0, 1, "{to the right of|right of|on the right of|on the right side of}"),
    "above": (1, -1, "{above|over|higher than}"),
    "below": (1, 1, "{below|under|beneath|lower than}"),
}
_EXTREMES: dict[str, tuple[str, int, str]] = {
    "leftmost": ("x", 1, "{leftmost|farthest left|furthest left|furthest to the left}"),
    "rightmost": ("x", -1, "{rightmost|farthest right|furthest right|furthest to the right}"),
    "topmost": ("y", 1, "{topmost|highest|uppermost|nearest to the top}"),
    "bottommost": ("y", -1, "{bottommost|lowest|lowermost|nearest to the bottom}"),
    "largest": ("area", -1, "{largest|biggest}"),
    "smallest": ("area", 1, "{smallest|tiniest}"),
}


class Shown:
    """What a question may speak of: the objects of a scene by colour, shape and both, and words for each."""

    def __init__(self, context: Context, objects: Sequence[SceneObject]) -> None:
        self.context = context
        self.rng = context.rng
        self.objects = list(objects)
        self.by_color: dict[str, list[SceneObject]] = {}
        self.by_shape: dict[str, list[SceneObject]] = {}
        self.by_label: dict[str, list[SceneObject]] = {}
        for thing in objects:
            self.by_color.setdefault(thing.color, []).append(thing)
            self.by_shape.setdefault(thing.name, []).append(thing)
            self.by_label.setdefault(thing.label, []).append(thing)
        self.unique = [thing for thing in objects if len(self.by_label[thing.label]) == 1]

    def _say(self, *templates: str) -> str:
        return expand(self.rng, self.rng.choice(templates))

    def _refer(self, thing: SceneObject) -> str:
        """A name that fits this object alone."""
        names = [thing.label]
        if len(self.by_shape[thing.name]) == 1:
            names.append(thing.name)
        if len(self.by_color[thing.color]) == 1:
            names.append(f"{thing.color} THING")
        return self.rng.choice(names)

    def _at(self, thing: SceneObject, axis: int) -> float:
        """Centre as a share of the canvas along an axis (0 is x, 1 is y)."""
        return thing.center[axis] / self.context.size[axis]

    def _tenth(self, thing: SceneObject, axis: int) -> str:
        return tenths(thing.center[axis], self.context.size[axis])

    def _size_digit(self, thing: SceneObject) -> str:
        """Area on a logarithmic scale from 0 to 9, as a share of the canvas."""
        share = thing.area / (self.context.size[0] * self.context.size[1])
        return str(max(0, min(9, int(math.log(share * 96 * 96 / 45) / 0.37))))

    def _location(self, thing: SceneObject) -> str:
        return location(thing.center, self.context.size)

    def _top_down(self, things: Sequence[SceneObject]) -> list[SceneObject]:
        return sorted(things, key=lambda thing: thing.center[1])


class ShapeQuestions(Shown):
    """Asks about coloured shapes. Every method returns a question, or ``None`` when the scene offers none."""

    def ask(self, number: int = 12) -> list[Question]:
        """Up to ``number`` different questions, rarer types no less often than common ones."""
        makers: dict[Callable[[], Question | None], float] = {
            self.color: 1.0,
            self.shape: 1.0,
            self.count: 1.7,
            self.exist: 1.4,
            self.spatial: 1.7,
            self.relation: 1.6,
            self.where: 1.3,
            self.larger: 1.5,
            self.extreme: 1.5,
            self.more: 1.0,
            self.same: 1.4,
            self.describe: 0.35,
        }
        questions: list[Question] = []
        seen: set[str] = set()
        for _ in range(3 * number):
            if len(questions) == number:
                break
            question = self.rng.choices(list(makers), list(makers.values()))[0]()
            if question is not None and question.text not in seen:
                seen.add(question.text)
                questions.append(question)
        return questions

    def color(self) -> Question | None:
        things = [thing for thing in self.objects if len(self.by_shape[thing.name]) == 1]
        if not things:
            return None
        thing = self.rng.choice(things)
        text = self._say(
            f"what COLOR is the {thing.name}?",
            f"what is the COLOR of the {thing.name}?",
            f"which COLOR {{does the {thing.name} have|is the {thing.name}}}?",
            f"what COLOR does the {thing.name} have?",
            f"COLOR of the {thing.name}?",
            f"the {thing.name} {{is|has}} what COLOR?",
            f"{{tell me|name|give|identify}} the COLOR of the {thing.name}.",
            f"{{can|could}} you tell me {{what COLOR the {thing.name} is|the COLOR of the {thing.name}}}?",
            f"{{in what|in which}} COLOR is the {thing.name} {{drawn|painted|shown}}?",
            f"there is {article(thing.name)} in the IMAGE. what COLOR is it?",
            f"what COLOR is the {thing.name} in {{the|this}} IMAGE?",
        )
        reasoning = f"{thing.name} {self._location(thing)} {thing.color}"
        return Question("color", text, thing.color, reasoning, (thing.box,))

    def shape(self) -> Question | None:
        things = [thing for thing in self.objects if len(self.by_color[thing.color]) == 1]
        if not things:
            return None
        thing = self.rng.choice(things)
        color = thing.color
        text = self._say(
            f"what shape is the {color} THING?",
            f"what is the {color} THING?",
            f"which shape is {color}?",
            f"what {color} shape is {{there|shown|in the IMAGE}}?",
            f"the {color} THING {{has|is}} {{what|which}} shape?",
            f"what is the shape of the {color} THING?",
            f"{{tell me|name|give|identify}} the {{shape of the {color} THING|{color} shape}}.",
            f"what shape does the {color} THING have?",
            f"{{what kind of|which|what type of}} {{shape|figure}} is the {color} {{one|THING}}?",
            f"what is {color} in {{the|this}} IMAGE?",
            f"which THING is {color}?",
            f"one of the THINGs is {color}: {{which shape is it|what is it}}?",
            f"{{which|what}} THING {{was drawn|is drawn|is painted}} in {color}?",
        )
        reasoning = f"{color} {self._location(thing)} {thing.name}"
        return Question("shape", text, thing.name, reasoning, (thing.box,))

    def count(self) -> Question | None:
        rng, draw = self.rng, self.rng.random()
        things: list[SceneObject]
        noun: str
        among: tuple[str, ...] = ()
        if draw < 0.25 or not self.objects:
            noun, things = "THINGs", self.objects

            def note(thing: SceneObject) -> str:
                return thing.name

        elif draw < 0.5:
            color = rng.choice(list(self.by_color) if rng.random() < 0.85 else list(COLORS))
            noun, things = f"{color} THINGs", self.by_color.get(color, [])
            among = (
                f"{{of|among|out of}} {{the|all the|all}} THINGs, how many are {color}?",
                f"how many THINGs {{have the COLOR {color}|were drawn in {color}}}?",
                f"how many {color} ones {{are there|do you see}}?",
            )

            def note(thing: SceneObject) -> str:
                return thing.name

        elif draw < 0.8:
            shape = rng.choice(list(self.by_shape) if rng.random() < 0.85 else list(SHAPES))
            noun, things = plural(shape), self.by_shape.get(shape, [])
            among = (
                f"{{of|among|out of}} {{the|all the|all}} THINGs, how many are {plural(shape)}?",
                f"how many {{of these|of those}} THINGs are {plural(shape)}?",
            )

            def note(thing: SceneObject) -> str:
                return thing.color

        else:
            one = rng.choice(self.objects)
            noun, things = f"{one.color} {plural(one.name)}", self.by_label[one.label]

            def note(thing: SceneObject) -> str:
                x = self._at(thing, 0)
                return "left" if x < 1 / 3 else "right" if x > 2 / 3 else "center"

        text = self._say(
            f"how many {noun} are {{there|in the IMAGE|visible|shown|in this IMAGE}}?",
            f"how many {noun} {{do you see|can you see|does the IMAGE {{contain|have|show}}}}?",
            f"{{count|count all|please count}} the {noun}.",
            f"what is the {{number|total number|count}} of {noun}{{| in the IMAGE}}?",
            f"how many {noun}?",
            f"{{give|tell me|find}} the number of {noun}.",
            f"how many {noun} are there {{altogether|in total}}?",
            f"number of {noun}?",
            f"how many {noun} {{were drawn|are drawn|appear|exist|can be counted}}{{| in the IMAGE| here}}?",
            f"{{say|find out|work out}} how many {noun} {{there are|you see|the IMAGE has}}.",
            f"{{looking over|going through}} {{the|this}} IMAGE, how many {noun} do you find?",
            *among,
        )
        listing = " ".join(f"{note(t)} {k}" for k, t in enumerate(self._top_down(things), start=1))
        boxes = tuple(thing.box for thing in things)
        return Question("count", text, str(len(things)), listing or "no 0", boxes)

    def exist(self) -> Question | None:
        rng = self.rng
        present = bool(self.objects) and rng.random() < 0.5
        boxes: tuple[Box, ...] = ()
        if present:
            thing = rng.choice(self.objects)
            phrase = rng.choice((thing.label, thing.name, f"{thing.color} THING"))
            matching = [t for t in self.objects if phrase in (t.label, t.name, f"{t.color} THING")]
            boxes = tuple(t.box for t in matching)
            reasoning = f"{thing.label} {self._location(thing)}"
        else:
            absent = self._absent()
            if absent is None:
                return None
            phrase, reasoning = absent
        named = expand(rng, phrase)
        if rng.random() < 0.1:
            text = self._say(
                f"is there not {article(named)}{{| in the IMAGE}}?", f"does the IMAGE not contain {article(named)}?"
            )
            return Question("exist", text, "no" if present else "yes", reasoning, boxes)
        text = self._say(
            f"is there {article(named)}{{| in the IMAGE| in this IMAGE| here| anywhere}}?",
            f"{{do|can}} you see {article(named)}?",
            f"does {{the|this}} IMAGE {{contain|show|have|include}} {article(named)}?",
            f"is {article(named)} {{present|visible|shown|in the IMAGE}}?",
            f"is there any {named}{{| in the IMAGE}}?",
            f"{{can|could}} you {{find|spot}} {article(named)}{{| in the IMAGE| anywhere}}?",
            f"is {article(named)} {{drawn|to be seen|among the THINGs|one of the THINGs}}{{| here}}?",
            f"is any {{THING|of the THINGs}} {article(named)}?",
            f"{article(named)}: {{is it there|does the IMAGE have one|do you see one}}?",
            f"are there any {named.rsplit(' ', 1)[0] + ' ' if ' ' in named else ''}{plural(named.rsplit(' ', 1)[-1])}?",
        )
        return Question("exist", text, "yes" if present else "no", reasoning, boxes)

    def _absent(self) -> tuple[str, str] | None:
        """A description that fits nothing in the scene, and the reasoning that finds this out."""
        rng = self.rng
        for _ in range(20):
            draw = rng.random()
            color = rng.choice(list(self.by_color) if self.by_color and not 0.5 <= draw < 0.75 else list(COLORS))
            shape = rng.choice(list(self.by_shape) if self.by_shape and draw < 0.75 else list(SHAPES))
            if f"{color} {shape}" in self.by_label or not self.context.allowed(color, shape):
                continue
            phrase = f"{color} {shape}"
            if rng.random() < 0.35:
                if shape not in self.by_shape:
                    phrase = shape
                elif color not in self.by_color:
                    phrase = f"{color} THING"
            if shape in self.by_shape:
                found = " ".join(thing.color for thing in self.by_shape[shape][:3])
                return phrase, f"no {found} {shape}"
            if color in self.by_color:
                return phrase, "no " + " ".join(thing.name for thing in self.by_color[color][:3])
            return phrase, f"no {shape}"
        return None

    def spatial(self) -> Question | None:
        if len(self.objects) < 2 or not self.unique:
            return None
        for _ in range(12):
            anchor = self.rng.choice(self.unique)
            axis, sign, words = _DIRECTIONS[self.rng.choice(list(_DIRECTIONS))]
            gaps = {id(t): (self._at(t, axis) - self._at(anchor, axis)) * sign for t in self.objects if t is not anchor}
            beyond = [t for t in self.objects if gaps.get(id(t), -1.0) > _MARGIN]
            if len(beyond) != 1 or any(0 < gap <= _MARGIN for gap in gaps.values()):
                continue
            found, name = beyond[0], self._refer(anchor)
            text = self._say(
                f"what is {words} the {name}?",
                f"which THING is {words} the {name}?",
                f"what {{lies|stands|can be seen}} {words} the {name}?",
                f"{{name|tell me|find}} the THING {words} the {name}.",
                f"which THING is located {words} the {name}?",
                f"what THING is {words} the {name}{{| in the IMAGE}}?",
                f"{{find|take|start from}} the {name}. {{what|which THING}} is {words} it?",
                f"{words} the {name}, {{what|which THING}} {{is there|do you see|can be seen}}?",
                f"{{of|among}} the THINGs, which {{one |}}is {words} the {name}?",
            )
            steps = f"{anchor.label} {self._tenth(anchor, axis)} {found.label} {self._tenth(found, axis)}"
            return Question("spatial", text, found.label, steps, (anchor.box, found.box))
        return None

    def relation(self) -> Question | None:
        if len(self.unique) < 2:
            return None
        for _ in range(10):
            one, other = self.rng.sample(self.unique, 2)
            axis, sign, words = _DIRECTIONS[self.rng.choice(list(_DIRECTIONS))]
            gap = (self._at(one, axis) - self._at(other, axis)) * sign
            if abs(gap) <= _MARGIN:
                continue
            first, second = self._refer(one), self._refer(other)
            text = self._say(
                f"is the {first} {words} the {second}?",
                f"is the {first} {{located|placed|positioned}} {words} the {second}?",
                f"does the {first} {{lie|stand|appear}} {words} the {second}?",
                f"is it true that the {first} is {words} the {second}?",
                f"the {first} is {words} the {second}, {{yes or no|right|is that right|true or not}}?",
                f"{{do|can}} you see the {first} {words} the {second}?",
                f"{{compare|look at}} the {first} and the {second}: is the {first} {words} the {second}?",
                f"is {words} the {second} where the {first} is?",
            )
            steps = f"{one.label} {self._tenth(one, axis)} {other.label} {self._tenth(other, axis)}"
            return Question("relation", text, "yes" if gap > 0 else "no", steps, (one.box, other.box))
        return None

    def where(self) -> Question | None:
        if not self.unique:
            return None
        thing = self.rng.choice(self.unique)
        name = self._refer(thing)
        dx, dy = self._at(thing, 0) - 0.5, self._at(thing, 1) - 0.5
        steps = f"{thing.label} {self._tenth(thing, 1)} {self._tenth(thing, 0)}"
        if self.rng.random() < 0.3:
            axis = self.rng.randrange(2)
            gap = (dx, dy)[axis]
            if abs(gap) < 0.1:
                return None
            low, high = (("left", "right"), ("top", "bottom"))[axis]
            first, second = (low, high) if self.rng.random() < 0.5 else (high, low)
            pair = f"{first} or {{|the }}{second}"
            text = self._say(
                f"is the {name} {{on|at|in}} the {pair}?",
                f"is the {name} in the {pair} {{half|part}}{{| of the IMAGE}}?",
                f"{{which side is the {name} on|on which side is the {name}}}, {pair}?",
            )
            return Question("where", text, low if gap < 0 else high, steps, (thing.box,))
        if max(abs(dx), abs(dy)) < 0.09:
            answer = "center"
        elif min(abs(dx), abs(dy)) > 0.125:
            answer = f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
        else:
            return None
        text = self._say(
            f"where is the {name}{{| in the IMAGE| located| placed}}?",
            f"in {{which|what}} {{part|area|region|corner}} of the IMAGE is the {name}?",
            f"what is the {{position|location|place}} of the {name}?",
            f"where {{can you see|do you see|can i find}} the {name}?",
            f"{{tell me|say|describe}} where the {name} is.",
            f"{{which|what}} {{part|area|corner}} of the IMAGE {{contains|has}} the {name}?",
        )
        return Question("where", text, answer, steps, (thing.box,))

    def larger(self) -> Question | None:
        if len(self.unique) < 2:
            return None
        for _ in range(10):
            one, other = self.rng.sample(self.unique, 2)
            if not _clearly_larger(one, other) and not _clearly_larger(other, one):
                continue
            bigger = self.rng.random() < 0.6
            word = "{larger|bigger}" if bigger else "smaller"
            winner = one if (one.area > other.area) == bigger else other
            steps = f"{one.label} {self._size_digit(one)} {other.label} {self._size_digit(other)}"
            boxes = (one.box, other.box)
            if self.rng.random() < 0.35:
                text = self._say(
                    f"is the {self._refer(one)} {word} than the {self._refer(other)}?",
                    f"is the {self._refer(one)} the {word} one compared {{to|with}} the {self._refer(other)}?",
                )
                return Question("larger", text, "yes" if winner is one else "no", steps, boxes)
            first, second = one.label, other.label
            text = self._say(
                f"which {{is|one is|THING is}} {word}{{,|:}} the {first} or the {second}?",
                f"what is {word}{{,|:}} the {first} or the {second}?",
                f"is the {first} or the {second} {word}?",
                f"which is the {word} {{one|THING}}, the {first} or the {second}?",
                f"{{of|between}} the {first} and the {second}, which is {word}?",
            )
            return Question("larger", text, winner.label, steps, boxes)
        return None

    def extreme(self) -> Question | None:
        if len(self.objects) < 2:
            return None
        for _ in range(6):
            measure, sign, words = _EXTREMES[self.rng.choice(list(_EXTREMES))]
            if measure == "area":
                ranked = sorted(self.objects, key=lambda t: sign * t.area)
                clear = _clearly_larger(*ranked[:2]) or _clearly_larger(*ranked[1::-1])
                notes = [self._size_digit(t) for t in ranked[:2]]
            else:
                axis = "xy".index(measure)
                ranked = sorted(self.objects, key=lambda t: sign * t.center[axis])
                clear = abs(self._at(ranked[0], axis) - self._at(ranked[1], axis)) > 0.06
                notes = [self._tenth(t, axis) for t in ranked[:2]]
            if not clear:
                continue
            winner, second = ranked[:2]
            steps = f"{second.label} {notes[1]} {winner.label} {notes[0]}"
            boxes = (winner.box, second.box)
            draw = self.rng.random()
            before = "nearest" not in words or self.rng.random() < 0.5
            word = expand(self.rng, words)
            if " " in word or not before:
                text = self._say(
                    f"which THING is {word}?",
                    f"what THING is {word}?",
                    f"what is {word}?",
                    f"{{among|of|out of}} {{the|all the|all}} THINGs, {{which|what}} is {word}?",
                )
                return Question("extreme", text, winner.label, steps, boxes)
            if draw < 0.5:
                text = self._say(
                    f"what is the {word} THING?",
                    f"which THING is {{|the }}{word}?",
                    f"{{name|tell me|find|identify}} the {word} THING.",
                    f"what is the {word} THING in {{the|this}} IMAGE?",
                    f"{{among|out of}} {{the|all the|all}} THINGs, {{which|what}} is {{|the }}{word}{{| one}}?",
                    f"{{say|show me|point out}} {{which THING is|what is}} the {word}{{| one}}.",
                    f"the {word} THING is {{what|which one|called what}}?",
                )
                return Question("extreme", text, winner.label, steps, boxes)
            if draw < 0.75:
                text = self._say(
                    f"what COLOR is the {word} THING?",
                    f"what is the COLOR of the {word} THING?",
                    f"which COLOR does the {word} THING have?",
                )
                return Question("extreme", text, winner.color, steps, boxes)
            text = self._say(
                f"what shape is the {word} THING?",
                f"what is the shape of the {word} THING?",
                f"which shape does the {word} THING have?",
            )
            return Question("extreme", text, winner.name, steps, boxes)
        return None

    def more(self) -> Question | None:
        rng = self.rng
        by_name = rng.random() < 0.5
        groups = self.by_shape if by_name else self.by_color
        pool = [*groups, rng.choice(SHAPES if by_name else list(COLORS))]

        def nouns(name: str) -> str:
            return plural(name) if by_name else f"{name} THINGs"

        if len(pool) < 2:
            return None
        one, other = rng.sample(pool, 2)
        first, second = groups.get(one, []), groups.get(other, [])
        if one == other or (len(first) == len(second) and rng.random() < 0.6):
            return None
        boxes = tuple(thing.box for thing in first + second)
        steps = f"{one} {len(first)} {other} {len(second)}"
        if rng.random() < 0.3:
            text = self._say(
                f"are there fewer {nouns(one)} than {nouns(other)}?",
                f"does the IMAGE {{have|show|contain}} fewer {nouns(one)} than {nouns(other)}?",
            )
            return Question("more", text, "yes" if len(first) < len(second) else "no", steps, boxes)
        text = self._say(
            f"are there more {nouns(one)} than {nouns(other)}{{| in the IMAGE}}?",
            f"{{do|can}} you {{see|find|count}} more {nouns(one)} than {nouns(other)}?",
            f"{{comparing|counting}} {nouns(one)} and {nouns(other)}, are there more {nouns(one)}?",
            f"does the IMAGE {{have|show|contain}} more {nouns(one)} than {nouns(other)}?",
            f"is the number of {nouns(one)} {{larger|greater|higher}} than the number of {nouns(other)}?",
        )
        return Question("more", text, "yes" if len(first) > len(second) else "no", steps, boxes)

    def same(self) -> Question | None:
        by_name = self.rng.random() < 0.7
        groups = self.by_shape if by_name else self.by_color
        single = [thing for thing in self.unique if len(groups[thing.name if by_name else thing.color]) == 1]
        if len(single) < 2:
            return None
        wanted = self.rng.random() < 0.5
        for _ in range(6):
            one, other = self.rng.sample(single, 2)
            equal = one.color == other.color if by_name else one.name == other.name
            if equal == wanted:
                break
        if by_name:
            first, second, quality = one.name, other.name, "COLOR"
            steps = f"{one.name} {one.color} {other.name} {other.color}"
        else:
            first, second, quality = f"{one.color} THING", f"{other.color} THING", "shape"
            steps = f"{one.color} {one.name} {other.color} {other.name}"
        text = self._say(
            f"are the {first} and the {second} the same {quality}?",
            f"do the {first} and the {second} have the same {quality}?",
            f"{{is|has}} the {first} the same {quality} as the {second}?",
            f"do the {first} and the {second} {{share|match in}} {quality}?",
        )
        return Question("same", text, "yes" if equal else "no", steps, (one.box, other.box))

    def describe(self) -> Question | None:
        things = self._top_down(self.objects)
        if len(things) > 5:
            return None
        text = self._say(
            "describe the IMAGE.",
            "list the THINGs{| from top to bottom}.",
            "what is in the IMAGE?",
            "what {do|can} you see?",
            "what does the IMAGE show?",
        )
        answer = ", ".join(thing.label for thing in things) or "nothing"
        return Question("describe", text, answer, "", tuple(thing.box for thing in things))


def _clearly_larger(one: SceneObject, other: SceneObject) -> bool:
    """Larger in area and in extent, so that no reading of ``larger`` says otherwise."""

    def extent(thing: SceneObject) -> float:
        left, top, right, bottom = thing.box
        return (right - left) * (bottom - top)

    return one.area / other.area > _SIZE_RATIO and extent(one) > 1.1 * extent(other)
