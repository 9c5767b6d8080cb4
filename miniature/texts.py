"""The words of the miniature world: captions, questions, dialogues and descriptions of a scene.

Every text is computed from the objects of a `miniature.world.Scene`, so each answer is right by construction.
All texts are lower case; answers and captions carry no final punctuation. Nothing here draws or reads a file:

    from miniature import texts
    texts.captions(scene, rng)            # ["two dogs and a car", "a car and two dogs"]
    texts.ask(scene, rng, "count")        # Question("count", "how many dogs are there?", "two")
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miniature.world import Scene


@dataclass(frozen=True)
class Kind:
    """One kind of thing: its two noun forms and the emoji that draws it, if one does."""

    singular: str
    plural: str
    code_point: int = 0


@dataclass(frozen=True)
class Question:
    """One question about a scene (or one dialogue turn) with its answer."""

    type: str
    question: str
    answer: str


KINDS = {
    kind.singular: kind
    for kind in (
        Kind("dog", "dogs", 0x1F415),
        Kind("cat", "cats", 0x1F431),
        Kind("horse", "horses", 0x1F40E),
        Kind("bird", "birds", 0x1F426),
        Kind("fish", "fish", 0x1F420),
        Kind("rabbit", "rabbits", 0x1F407),
        Kind("pig", "pigs", 0x1F416),
        Kind("elephant", "elephants", 0x1F418),
        Kind("turtle", "turtles", 0x1F422),
        Kind("butterfly", "butterflies", 0x1F98B),
        Kind("apple", "apples", 0x1F34E),
        Kind("banana", "bananas", 0x1F34C),
        Kind("car", "cars", 0x1F697),
        Kind("bus", "buses", 0x1F68C),
        Kind("tree", "trees", 0x1F333),
        Kind("flower", "flowers", 0x1F33B),
        Kind("mushroom", "mushrooms", 0x1F344),
        Kind("house", "houses", 0x1F3E0),
        Kind("bicycle", "bicycles", 0x1F6B2),
        Kind("boat", "boats", 0x26F5),
        Kind("airplane", "airplanes", 0x2708),
        Kind("ball", "balls", 0x26BD),
        Kind("umbrella", "umbrellas", 0x2602),
        Kind("clock", "clocks", 0x23F0),
    )
}
NUMBERS = ("zero", "one", "two", "three", "four")
QUESTION_TYPES = (
    "count", "count_absent", "exist", "background", "side", "height", "list", "where",
)  # fmt: skip

_COUNT = ("how many {many} are in the picture?", "how many {many} are there?", "how many {many} do you see?")
_EXIST = (
    "is there {one} in the picture?",
    "is there {one}?",
    "are there any {many}?",
    "do you see {one}?",
)
_BACKGROUND = ("what color is the background?", "what is the background color?")
_SIDE = ("which side {is_the} on?", "on which side {is_the}?")
_HEIGHT = "{is_the} at the top or at the bottom?"
_LIST = ("what is in the picture?", "what do you see?")


def with_article(noun: str) -> str:
    """The noun with its indefinite article; every noun of this world follows its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _phrase(scene: Scene, kind: str, number: int) -> str:
    return with_article(kind) if number == 1 else f"{NUMBERS[number]} {scene.kinds[kind].plural}"


def _the(scene: Scene, kind: str, number: int) -> str:
    return f"the {kind}" if number == 1 else f"the {scene.kinds[kind].plural}"


def _fill(scene: Scene, template: str, kind: str, number: int = 0) -> str:
    is_the = f"{'is' if number == 1 else 'are'} {_the(scene, kind, number)}"
    return template.format(one=with_article(kind), many=scene.kinds[kind].plural, is_the=is_the)


def _absent(scene: Scene) -> list[str]:
    present = scene.counts()
    return [kind for kind in scene.kinds if kind not in present]


def plain_caption(scene: Scene, rng: random.Random) -> str:
    """Every kind with its count in random order: "a cat, three apples and two buses"."""
    phrases = [_phrase(scene, kind, number) for kind, number in scene.counts().items()]
    rng.shuffle(phrases)
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Two captions: a plain list, and a second one that now and then opens with "there is" or "there are"."""
    first, second = plain_caption(scene, rng), plain_caption(scene, rng)
    if rng.random() < 0.25:
        opening = "there is" if second.split()[0] in ("a", "an") else "there are"
        second = f"{opening} {second}"
    return [first, second]


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    return [
        Question("count", _fill(scene, rng.choice(_COUNT), kind), NUMBERS[number])
        for kind, number in scene.counts().items()
    ]


def _count_absent(scene: Scene, rng: random.Random) -> list[Question]:
    kinds = rng.sample(_absent(scene), 3)
    return [Question("count_absent", _fill(scene, rng.choice(_COUNT), kind), NUMBERS[0]) for kind in kinds]


def _exist(scene: Scene, rng: random.Random) -> list[Question]:
    """Two questions answered yes and two answered no, so that a draw among them is balanced."""
    present = list(scene.counts())
    asked = rng.sample(present, 2) if len(present) > 1 else present * 2
    pairs = [(kind, "yes") for kind in asked] + [(kind, "no") for kind in rng.sample(_absent(scene), 2)]
    templates = rng.sample(_EXIST, 4)
    return [
        Question("exist", _fill(scene, template, kind), answer)
        for template, (kind, answer) in zip(templates, pairs, strict=True)
    ]


def _background(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("background", rng.choice(_BACKGROUND), scene.background)] if scene.background else []


def _side(scene: Scene, rng: random.Random) -> list[Question]:
    return [
        Question("side", _fill(scene, rng.choice(_SIDE), kind, number), side)
        for kind, number in scene.counts().items()
        if (side := scene.side(kind))
    ]


def _height(scene: Scene, rng: random.Random) -> list[Question]:
    return [
        Question("height", _fill(scene, _HEIGHT, kind, number), height)
        for kind, number in scene.counts().items()
        if (height := scene.height_of(kind))
    ]


def _list(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("list", rng.choice(_LIST), plain_caption(scene, rng))]


def _where(scene: Scene, rng: random.Random) -> list[Question]:
    """What is on a side: asked only if every kind keeps to a side and one kind alone is on the asked one."""
    sides = {kind: scene.side(kind) for kind in scene.counts()}
    if not all(sides.values()):
        return []
    return [
        Question("where", f"what is on the {side}?", _phrase(scene, kinds[0], scene.counts()[kinds[0]]))
        for side in ("left", "right")
        if len(kinds := [kind for kind, its_side in sides.items() if its_side == side]) == 1
    ]


_MENU: dict[str, Callable[[Scene, random.Random], list[Question]]] = {
    "count": _count,
    "count_absent": _count_absent,
    "exist": _exist,
    "background": _background,
    "side": _side,
    "height": _height,
    "list": _list,
    "where": _where,
}


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """The full menu: every applicable question type, several of a type where the scene gives several."""
    return [question for make in _MENU.values() for question in make(scene, rng)]


def ask(scene: Scene, rng: random.Random, question_type: str) -> Question | None:
    """One random question of a type, or None where the scene has none (`exist` is yes or no at even odds)."""
    choices = _MENU[question_type](scene, rng)
    return rng.choice(choices) if choices else None


def sample_questions(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """At most `number` questions of the menu: one of every applicable type first, then others at random."""
    menu = questions(scene, rng)
    rng.shuffle(menu)
    firsts = {question.type: question for question in menu}
    others = [question for question in menu if question is not firsts[question.type]]
    chosen = [*firsts.values(), *others][:number]
    rng.shuffle(chosen)
    return chosen


_OTHER_WORDS = (
    ("picture", ("image", "photo", "scene")),
    ("in the", ("in this",)),
    ("what is", ("what's", "what is")),
    ("color", ("colour",)),
    ("do you see", ("can you see",)),
)
_OPENINGS = ("in this picture, ", "in the image, ", "please answer: ", "please tell me, ", "tell me, ")


def as_typed(question: str, rng: random.Random) -> str:
    """The question as people also type it: in other words, half of the time without its question mark, half with a
    capital letter."""
    for word, others in _OTHER_WORDS:
        if word in question and rng.random() < 0.4:
            question = question.replace(word, rng.choice(others))
    if not question.startswith("and ") and rng.random() < 0.15:
        question = rng.choice(_OPENINGS) + question
    question = question.removesuffix("?") if rng.random() < 0.5 else question
    return question[0].upper() + question[1:] if rng.random() < 0.5 else question


def _followup(question: str, answer: str) -> Question:
    return Question("followup", question, answer)


def _place_turns(scene: Scene, kind: str, pronoun: bool) -> list[Question]:
    """Follow-up turns on the place of a kind, as far as it is clear."""
    number = scene.counts()[kind]
    verb = "is" if number == 1 else "are"
    name = ("it" if number == 1 else "they") if pronoun else _the(scene, kind, number)
    side, height, turns = scene.side(kind), scene.height_of(kind), []
    if side:
        wording = f"which side {verb} {name} on?" if pronoun else f"and on which side {verb} {name}?"
        turns.append(_followup(wording, side))
    if height:
        wording = "at the top or at the bottom?" if side else f"{verb} {name} at the top or at the bottom?"
        turns.append(_followup(f"and {wording}", height))
    return turns


def _number_dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """ "how many dogs are there?" "two", "and cats?" "zero", "and on which side are the dogs?" "left"."""
    counts = scene.counts()
    present = rng.sample(list(counts), len(counts))
    others = present[1:] + rng.sample(_absent(scene), max(1, len(present) - 1))
    rng.shuffle(others)
    kind = present[0]
    turns = [Question("count", _fill(scene, rng.choice(_COUNT), kind), NUMBERS[counts[kind]])]
    for other in others[: rng.randint(1, 2)]:
        turns.append(_followup(f"and {scene.kinds[other].plural}?", NUMBERS[counts.get(other, 0)]))
    return turns + _place_turns(scene, kind, pronoun=False)


def _yes_dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """ "is there a dog?" "yes", "how many?" "two", "which side are they on?" "left"."""
    kind = rng.choice(list(scene.counts()))
    number = scene.counts()[kind]
    return [
        Question("exist", _fill(scene, rng.choice(_EXIST), kind), "yes"),
        _followup("how many?", NUMBERS[number]),
        *_place_turns(scene, kind, pronoun=True),
    ]


def _no_dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """ "are there any buses?" "no", "and cars?" "yes", "how many?" "three"."""
    first, second = rng.sample(_absent(scene), 2)
    kind = rng.choice(list(scene.counts()))
    turns = [Question("exist", _fill(scene, rng.choice(_EXIST), first), "no")]
    if rng.random() < 0.4:
        turns.append(_followup(f"and {scene.kinds[second].plural}?", "no"))
    turns.append(_followup(f"and {scene.kinds[kind].plural}?", "yes"))
    turns.append(_followup("how many?", NUMBERS[scene.counts()[kind]]))
    return turns + _place_turns(scene, kind, pronoun=True)


def _list_dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """ "what do you see?" "two dogs and a car", "how many dogs are there?" "two", "and apples?" "zero"."""
    counts = scene.counts()
    present = rng.sample(list(counts), len(counts))
    other = rng.choice(present[1:2] + rng.sample(_absent(scene), 1))
    return [
        *_list(scene, rng),
        _followup(_fill(scene, rng.choice(_COUNT), present[0]), NUMBERS[counts[present[0]]]),
        _followup(f"and {scene.kinds[other].plural}?", NUMBERS[counts.get(other, 0)]),
        *([_followup("and the background color?", scene.background)] if scene.background else []),
    ]


def _side_dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """ "which side are the dogs on?" "left", "and the car?" "right", "how many dogs are there?" "two"."""
    counts = scene.counts()
    sides = {kind: side for kind in counts if (side := scene.side(kind))}
    clear = list(sides)
    if not clear:
        return []
    rng.shuffle(clear)
    turns = [Question("side", _fill(scene, rng.choice(_SIDE), clear[0], counts[clear[0]]), sides[clear[0]])]
    turns += [_followup(f"and {_the(scene, kind, counts[kind])}?", sides[kind]) for kind in clear[1:]]
    asked = rng.choice(clear)
    return [*turns, _followup(f"and how many {scene.kinds[asked].plural} are there?", NUMBERS[counts[asked]])]


def dialogues(scene: Scene, rng: random.Random) -> list[list[Question]]:
    """Four or five dialogues of two to four turns, shuffled; the later turns lean on the earlier ones."""
    makers = (_number_dialogue, _yes_dialogue, _no_dialogue, _list_dialogue, _side_dialogue)
    drawn = [turns[: rng.randint(2, 4)] for make in makers if (turns := make(scene, rng))]
    rng.shuffle(drawn)
    return drawn


def description(scene: Scene, rng: random.Random) -> str:
    """All facts of the scene in random order, enough to answer every question: "two dogs left top , ..."."""
    facts = [f"{scene.background} background"] if scene.background else []
    for kind, number in scene.counts().items():
        noun = kind if number == 1 else scene.kinds[kind].plural
        words = (NUMBERS[number], noun, scene.side(kind), scene.height_of(kind))
        facts.append(" ".join(word for word in words if word))
    rng.shuffle(facts)
    return rng.choice((" , ", " ; ")).join(facts)


KIND_OF = {word: kind.singular for kind in KINDS.values() for word in (kind.singular, kind.plural)}
_ARTICLE_NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in enumerate(NUMBERS)}


def read_caption(caption: str, kind_of: Mapping[str, str] = KIND_OF) -> Counter[str] | None:
    """Kinds and counts that a caption names; None if any word of it is something else. ``kind_of``: the kind of each
    noun."""
    caption = re.sub(r"^there (is|are) ", "", caption)
    counts: Counter[str] = Counter()
    for phrase in re.split(r", | and ", caption):
        number, _, noun = phrase.partition(" ")
        if number not in _ARTICLE_NUMBERS or noun not in kind_of or kind_of[noun] in counts:
            return None
        counts[kind_of[noun]] = _ARTICLE_NUMBERS[number]
    return counts
