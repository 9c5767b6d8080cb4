"""What blip2 does, on one image with the bundled model: it describes, answers, chooses and chats.

python examples/demo.py            the bundled miniature
python examples/demo.py MODEL      any other model: a folder, or a name on the Hugging Face hub
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import blip2

PICTURE = Path(__file__).parent / "picture.png"
SHOWN = "examples/picture.png"

QUESTIONS = [
    "how many dogs are there?",
    "is there a cat?",
    "which side is the boat on?",
    "what color is the background?",
]
CONVERSATION = ["what do you see?", "how many dogs are there?", "and cats?", "and the background color?"]


def heading(text: str, command: str) -> None:
    print(f"\n{text}\n  $ {command}")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    option = f" --model {model}" if model else ""
    print(f"The picture is {SHOWN}: two dogs and a boat on blue, and none of these words are in it.")
    started = time.perf_counter()
    blip = blip2.load(model)
    picture = blip.encode(PICTURE)  # seen once; everything below only reads what was seen
    print(f"Model loaded and picture encoded in {time.perf_counter() - started:.1f} s.")

    heading("Describe it:", f"blip2 caption {SHOWN}{option}")
    print(f"  {blip.caption(picture)}")

    heading("Describe it by chance, in three ways:", f"blip2 caption {SHOWN} -n 3 --sample --seed 1{option}")
    for caption in blip.caption(picture, num_captions=3, sample=True, seed=1):
        print(f"  {caption}")

    heading("Ask about it:", f'blip2 ask {SHOWN} "{QUESTIONS[0]}"{option}')
    for question, answer in zip(QUESTIONS, blip.ask(picture, QUESTIONS), strict=True):
        print(f"  {question:32} {answer}")

    choices = ["left", "right", "top", "bottom"]
    question = QUESTIONS[2]
    heading("Let it choose:", f'blip2 ask {SHOWN} "{question}" --choices {",".join(choices)} --json{option}')
    for choice in blip.rank(picture, question, choices):
        print(f"  {choice.text:32} {choice.probability:6.1%}")

    heading("Talk about it, each question resting on those before:", f"blip2 chat {SHOWN}{option}")
    chat = blip.chat(picture)
    for question in CONVERSATION:
        print(f"  > {question}\n  ", end="")
        for piece in chat.stream(question):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except blip2.Blip2Error as error:
        sys.exit(f"demo: {error}")
