"""Stage 2: what the language model reads, what it has to write, and that company changes nothing."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from blip2 import checkpoint
from blip2.data import Row, Turn
from blip2.text import Tokenizer
from blip2.train import stage2
from blip2.train.recipes import DataRecipe, MixRecipe
from blip2.train.stage2 import Text
from blip2.train.texts import TextSource

ROW = Row(
    "a.png",
    captions=("two dogs and a red car",),
    questions=(Turn("how many dogs are there?", "two"), Turn("is there a cat?", "no")),
    dialogues=((Turn("is there a car?", "yes"), Turn("where is it?", "left")),),
)


def source(folder, **recipe):
    config = checkpoint.read_config(folder).language
    tokenizer = Tokenizer.from_folder(folder)
    return TextSource(tokenizer, config, DataRecipe(rows=(), **recipe)), tokenizer, config


def only(kind):
    return MixRecipe(**{name: float(name == kind) for name in ("captions", "questions", "dialogues")})


def texts_of(folder, count=40, **recipe):
    """Distinct (prompt, target) pairs, as text, that are drawn about `ROW`; ids too."""
    texts, tokenizer, config = source(folder, **recipe)
    drawn = texts.draw(ROW, count, random.Random(0))
    return drawn, {(tokenizer.decode(t.prompt_ids), tokenizer.decode(t.target_ids)) for t in drawn}, tokenizer, config


def test_opt_texts(opt_model):
    drawn, said, tokenizer, config = texts_of(opt_model, mix=only("captions"))
    assert said == {("", "two dogs and a red car")}
    assert drawn[0].prompt_ids == [config.bos_token_id]
    assert drawn[0].target_ids == [*tokenizer.encode("two dogs and a red car"), config.eos_token_id]
    drawn, said, tokenizer, config = texts_of(opt_model, mix=only("questions"))
    assert said == {
        ("Question: how many dogs are there? Answer:", "two"),
        ("Question: is there a cat? Answer:", "no"),
    }
    assert {tuple(text.target_ids) for text in drawn} == {
        (*tokenizer.encode(f" {answer}"), config.eos_token_id) for answer in ("two", "no")
    }
    assert all(text.prompt_ids[0] == config.bos_token_id for text in drawn)


def test_dialogues_ask_any_turn_after_those_before_it(any_model):
    _, said, *_ = texts_of(any_model, mix=only("dialogues"))
    assert said == {
        ("Question: is there a car? Answer:", "yes"),
        ("Question: is there a car? Answer: yes. Question: where is it? Answer:", "left"),
    }


def test_a_caption_may_continue_a_prompt(any_model):
    _, said, *_ = texts_of(any_model, mix=only("captions"), caption_prompt="a photo of")
    assert said == {("a photo of", "two dogs and a red car")}


def test_t5_splits_captions_between_their_beginning_and_their_middle(tmp_path_factory):
    from tests import tiny

    folder = tiny.save_generative("t5", tmp_path_factory.mktemp("t5"))
    drawn, _, tokenizer, config = texts_of(folder, count=200, mix=only("captions"))
    whole = tokenizer.encode("two dogs and a red car")
    splits = set()
    for text in drawn:
        assert text.prompt_ids[-1] == text.target_ids[-1] == config.eos_token_id
        assert text.prompt_ids[:-1] + text.target_ids[:-1] == whole
        splits.add(len(text.prompt_ids) - 1)
    assert splits == set(range(1, len(whole) // 2 + 1))

    texts, tokenizer, config = source(folder, mix=only("captions"))
    word = next(word for word in ("dogs", "two", "a") if len(tokenizer.encode(word)) == 1)
    (text,) = texts.draw(Row("a.png", captions=(word,)), 1, random.Random(0))
    assert text.prompt_ids == [config.eos_token_id]
    assert text.target_ids == [*tokenizer.encode(word), config.eos_token_id]


def test_the_mix(any_model):
    texts, *_ = source(any_model, mix=MixRecipe(captions=1, questions=3, dialogues=0))
    kinds = [text.kind for text in texts.draw(ROW, 2000, random.Random(0))]
    assert "dialogue" not in kinds
    assert kinds.count("question") / len(kinds) == pytest.approx(0.75, abs=0.04)
    no_captions = Row("a.png", questions=ROW.questions)
    assert {text.kind for text in texts.draw(no_captions, 10, random.Random(0))} == {"question"}
    assert texts.can_use(no_captions) and not texts.can_use(Row("a.png", dialogues=ROW.dialogues))


def test_no_question_comes_twice_before_each_came_once(any_model):
    texts, *_ = source(any_model, mix=only("questions"))
    for seed in range(20):
        first, second = texts.draw(ROW, 2, random.Random(seed))
        assert first.prompt_ids != second.prompt_ids


def test_what_is_too_long_is_cut_and_counted(opt_model):
    texts, tokenizer, config = source(opt_model, mix=only("captions"), max_text_tokens=3)
    (text,) = texts.draw(ROW, 1, random.Random(0))
    assert text.target_ids == tokenizer.encode("two dogs and a red car")[:3]  # and no end
    assert texts.num_cut == 1
    history = (Turn("is there a car?", "yes"),) * 5
    asked = tokenizer.prompt_ids("Question: is there a car? Answer: yes. Question: is there a car? Answer:", config)
    texts, *_ = source(opt_model, mix=only("dialogues"), max_prompt_tokens=len(asked) + 3)
    longest = max(
        (texts.draw(Row("a.png", dialogues=(history,)), 1, random.Random(seed))[0] for seed in range(20)),
        key=lambda text: len(text.prompt_ids),
    )
    assert longest.prompt_ids == asked
    assert texts.num_cut > 0


# ---- losses -------------------------------------------------------------------------------------------


@pytest.fixture
def model(any_model):
    model = checkpoint.load(any_model)
    model.freeze_pretrained()
    return model


def some_texts(config, counts, seed=0):
    """Random texts of many lengths, ``counts[i]`` about image i."""
    chance = random.Random(seed)

    def ids(least, most):
        return [chance.randrange(4, config.vocab_size) for _ in range(chance.randint(least, most))]

    return [[Text("question", ids(1, 9), ids(1, 7)) for _ in range(count)] for count in counts]


def alone(model, patches_1PD, text):
    """The sum of the target tokens' negative log-likelihoods, written out for one text."""
    prompt_1QD = model.prompt(model.look(model.vision.post_norm(patches_1PD)))
    language, config = model.language, model.config.language
    if not config.has_encoder:
        read = torch.tensor([text.prompt_ids + text.target_ids])
        hidden = language(torch.cat([prompt_1QD, language.embed(read)], dim=1))
        logits = language.logits(hidden[0, -len(text.target_ids) - 1 : -1])
    else:
        read = torch.cat([prompt_1QD, language.embed(torch.tensor([text.prompt_ids]))], dim=1)
        decoded = torch.tensor([[config.decoder_start_token_id, *text.target_ids[:-1]]])
        logits = language.logits(language(read, torch.tensor([read.shape[1]]), decoded)[0])
    return F.cross_entropy(logits, torch.tensor(text.target_ids), reduction="sum")


@pytest.mark.parametrize("per_image", [1, 3])
def test_a_batch_is_its_texts_one_by_one(model, per_image):
    features_BPD = torch.randn(3, 5, 16)
    texts = some_texts(model.config.language, [per_image] * 3)
    found = stage2.losses(model, features_BPD, stage2.collate(texts, model.config.language))
    found.lm.backward()
    together = model.qformer.query_tokens.grad.clone()
    model.zero_grad()
    sums = [alone(model, features_BPD[number, None], text) for number, row in enumerate(texts) for text in row]
    num_targets = sum(len(text.target_ids) for row in texts for text in row)
    wanted = torch.stack(sums).sum() / num_targets
    wanted.backward()
    torch.testing.assert_close(found.lm, wanted)
    torch.testing.assert_close(together, model.qformer.query_tokens.grad, rtol=1e-3, atol=1e-6)
    assert len(found.is_right_N) == num_targets


def test_a_text_does_not_depend_on_its_neighbours(model):
    config = model.config.language
    features_BPD = torch.randn(2, 5, 16)
    texts = some_texts(config, [2, 2])
    others = [[row[0], other[1]] for row, other in zip(texts, some_texts(config, [2, 2], seed=1), strict=True)]

    def first_texts(batch):
        collated = stage2.collate(batch, config)
        # The likelihoods of the first text of each image: what only the others contribute to is left out.
        kept_N = collated.targets.text_N % 2 == 0
        targets = stage2.Targets(*(values[kept_N] for values in collated.targets))
        return stage2.losses(model, features_BPD, collated._replace(targets=targets)).lm

    torch.testing.assert_close(first_texts(texts), first_texts(others))


def test_which_tokens_are_right(model):
    """A text that greedy decoding gives is right in every token."""
    config = model.config.language
    features_1PD = torch.randn(1, 5, 16)
    start = [config.bos_token_id] if config.family == "opt" else [config.eos_token_id]
    with torch.no_grad():
        read = model.prompt(model.look(model.vision.post_norm(features_1PD)))
        read = torch.cat([read, model.language.embed(torch.tensor([start]))], dim=1)
        logits, state = model.language.prefill(read, torch.tensor([read.shape[1]]), 6)
        greedy = [logits.argmax(-1)]
        for _ in range(5):
            greedy.append(model.language.step(greedy[-1], state).argmax(-1))
    target = torch.cat(greedy).tolist()
    for wrong in (None, 2):
        if wrong is not None:
            target[wrong] = (target[wrong] + 1) % config.vocab_size
        collated = stage2.collate([[Text("caption", start, target)]], config)
        right = stage2.losses(model, features_1PD, collated).is_right_N
        assert right[: 6 if wrong is None else wrong].all()
        assert wrong is None or not right[wrong]


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(model):
    texts = some_texts(model.config.language, [2] * 3)
    stage2.losses(model, torch.randn(3, 5, 16), stage2.collate(texts, model.config.language)).lm.backward()
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(("qformer.", "projection.", "vision.post_norm."))
        assert parameter.requires_grad == is_trained, name
        # A bias that all keys share moves no attention: its gradient is nothing but rounding.
        has_gradient = parameter.grad is not None and (name.endswith("key.bias") or bool(parameter.grad.any()))
        assert has_gradient == is_trained, name


def test_padding_is_never_a_target(any_model):
    config = checkpoint.read_config(any_model).language
    texts = some_texts(config, [2, 2])
    collated = stage2.collate(texts, config)
    written = [token for row in texts for text in row for token in text.target_ids]
    assert collated.targets.token_N.tolist() == written
    assert all(first <= second for first, second in pairwise(collated.targets.text_N.tolist()))


def test_answers_of_several_people_are_drawn_as_often_as_they_were_given(opt_model):
    texts, tokenizer, _ = source(opt_model, mix=only("questions"))
    row = Row("a.png", questions=(Turn("how many?", "two", (("two", 3), ("2", 1))),))
    drawn = [text for step in range(400) for text in texts.draw(row, 1, random.Random(step))]
    said = [tokenizer.decode(text.target_ids).strip() for text in drawn]
    assert set(said) == {"two", "2"} and 250 < said.count("two") < 350
