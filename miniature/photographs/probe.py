"""What the frozen features alone know of the photographs: a linear probe, and the encoder's own classes.

    python -m miniature.photographs.probe --packages DIR --work WORK

The probe is a softmax over the kinds on the class token, which is the mean of an image's patches, trained on the scenes
of one kind in WORK/train and WORK/large with the features that stage 1 has kept in WORK/features: the same images, the
same features, as the Q-Former had. The classes are the 1,000 of ImageNet that the encoder was trained on; which of them
are which kind is in `CLASSES`, by hand. Last, whether a patch tells its place: how much of the variance of its row and
column a linear fit explains, learnt from 300 scenes, in 100 others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from blip2.checkpoint import load_encoder
from blip2.checkpoint.convolutions import lite_file
from blip2.checkpoint.pickled import unpickled
from blip2.convolutional import positions
from blip2.image import load_image, to_pixels
from miniature.photographs import packages
from miniature.photographs.score import HEADER, by_kind, kind_of_photographs, kind_of_scenes, read, share_line
from miniature.photographs.stamps import kinds

CLASSES: dict[str, tuple[str, ...]] = {
    "fish": (
        "tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark", "electric ray", "stingray",
        "snoek fish", "eel", "silver salmon", "rock beauty fish", "clownfish", "sturgeon", "gar fish", "lionfish",
        "pufferfish",
    ),
    "light bulb": (),
    "cup": ("tea cup", "coffee mug", "espresso"),
    "hammer": ("hammer",),
    "tape measure": ("ruler measuring stick",),
    "pair of pliers": (),
    "pair of scissors": (),
    "wrench": (),
    "giraffe": (),
    "chicken": ("rooster", "hen"),
    "cow": ("ox",),
    "duck": ("drake (male duck)", "red-breasted merganser"),
    "horse": ("common sorrel horse",),
    "owl": ("great grey owl",),
    "pig": ("pig", "wild boar"),
    "sheep": ("ram (adult male sheep)", "bighorn sheep"),
    "bison": ("bison",),
    "kangaroo": ("wallaby",),
    "koala": ("koala",),
    "bear": ("brown bear", "American black bear", "polar bear", "sloth bear"),
    "parrot": ("african grey parrot", "macaw", "sulphur-crested cockatoo", "lorikeet"),
    "drum": ("drum", "maraca"),
}
"""Kinds without a class cannot be right. All breeds (classes 151 to 268) are dogs."""
DOGS = range(151, 269)
STEPS, RATE, DECAY = 600, 1e-3, 1e-2
SIDE = 7
"""Of the last grid."""


def probe(features_NE: torch.Tensor, labels_N: torch.Tensor, num_kinds: int) -> torch.nn.Module:
    """A norm without weights, and a linear layer: AdamW on everything at once."""
    torch.manual_seed(0)
    mean_E, std_E = features_NE.mean(0), features_NE.std(0) + 1e-3
    layer = torch.nn.Linear(features_NE.shape[1], num_kinds)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        some = torch.randint(len(features_NE), (512,))
        loss = F.cross_entropy(layer((features_NE[some] - mean_E) / std_E), labels_N[some], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layer.weight.data /= std_E
    layer.bias.data -= layer.weight.data @ mean_E
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    names = list(kinds())
    kind_of = kind_of_photographs()
    unseen = read(options.work / "large-stamps/rows.jsonl")

    file = lite_file(options.packages / packages.ENCODER)
    assert file is not None
    vision, settings = load_encoder(file, layer="last", whole_picture=True)
    look = {"size": settings.size, "mean": settings.mean, "std": settings.std, "resample": settings.resample}

    @torch.no_grad()
    def seen(files: list[Path]) -> torch.Tensor:
        return torch.cat([vision.features(to_pixels([load_image(file)], **look))[:, 0] for file in files])

    photographs_NE = seen([options.work / "photographs" / name for name in kind_of])
    unseen_NE = seen([options.work / "large-stamps" / row["image"] for row in unseen])

    rows = [row for name in ("train", "large") for row in read(options.work / name / "rows.jsonl")]
    [kept] = (options.work / "features").glob("train-*.bin")
    shape = json.loads(kept.with_suffix(".json").read_text())["shape"]
    stored = torch.from_file(str(kept), size=shape[0] * shape[1] * shape[2], dtype=torch.float16).view(shape)
    place_PE = positions(SIDE, SIDE, shape[2])
    single = [number for number, row in enumerate(rows) if len({thing["kind"] for thing in row["objects"]}) == 1]
    trained_NE = torch.stack([stored[number, 0].float() for number in single])
    labels_N = torch.tensor([names.index(rows[number]["objects"][0]["kind"]) for number in single])
    print(f"probe: {len(single)} scenes of one kind, {len(names)} kinds\n\n{HEADER}")
    told = probe(trained_NE, labels_N, len(names))
    for name, seen_NE, kind_in in (
        ("photographs", photographs_NE, kind_of),
        ("large unseen cut-outs", unseen_NE, kind_of_scenes(unseen)),
    ):
        for top in (1, 5):
            best = [{names[place] for place in row} for row in told(seen_NE).topk(top).indices.tolist()]
            right = {file: kind in found for (file, kind), found in zip(kind_in.items(), best, strict=True)}
            line = share_line(f"probe, {name}, best {top}", sum(right.values()), len(right))
            print(line, f"<!-- {by_kind(right, kind_in)} -->")

    weights = unpickled(file)
    classes = json.loads((options.packages / packages.CLASSES).read_text())
    wanted = {kind: {classes.index(name) for name in found} for kind, found in CLASSES.items()} | {"dog": set(DOGS)}
    logits_NC = photographs_NE @ weights["_fc.weight"].T + weights["_fc.bias"]
    known = {name: kind for name, kind in kind_of.items() if wanted.get(kind)}
    for top in (1, 5):
        right = {
            name: bool(wanted[kind] & set(row))
            for (name, kind), row in zip(kind_of.items(), logits_NC.topk(top).indices.tolist(), strict=True)
            if name in known
        }
        print(share_line(f"own classes, best {top}, of kinds that have one", sum(right.values()), len(right)),
              f"<!-- {by_kind(right, known)} -->")  # fmt: skip

    some_NPE = stored[:: len(stored) // 400][:400, 1:].float()
    for name, seen_NPE in (("without positions", some_NPE - place_PE), ("with positions", some_NPE)):
        row, column = explained(F.layer_norm(seen_NPE, seen_NPE.shape[-1:]))
        print(f"place of a patch, {name}: {row:.2f} of the row's variance, {column:.2f} of the column's")


def explained(seen_NPE: torch.Tensor) -> list[float]:
    """Of 300 pictures a ridge regression learns row and column of a patch; R2 of both in the other pictures."""
    place_P = torch.arange(SIDE * SIDE)
    place_P2 = torch.stack([place_P // SIDE, place_P % SIDE], dim=1) - (SIDE - 1) / 2
    learnt_MD, other_MD = (part.flatten(0, 1) for part in (seen_NPE[:300], seen_NPE[300:]))
    ridge_DD = 1000 * torch.eye(learnt_MD.shape[1])
    weights_D2 = torch.linalg.solve(learnt_MD.T @ learnt_MD + ridge_DD, learnt_MD.T @ place_P2.repeat(300, 1))
    wanted_M2 = place_P2.repeat(len(seen_NPE) - 300, 1)
    left_M2 = other_MD @ weights_D2 - wanted_M2
    return (1 - left_M2.square().mean(0) / wanted_M2.var(0)).tolist()


if __name__ == "__main__":
    main()
