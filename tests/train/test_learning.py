"""The sanity check of any training: eight images are learnt by heart, and from the images."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from blip2 import checkpoint, train
from blip2.data import read_rows
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer, question_prompt

pytestmark = pytest.mark.training
OPTIM = {"batch_size": 8, "peak_lr": 2e-3, "warmup_steps": 30}


def learn(path, **overrides):
    """The last evaluation."""
    out = train.run(path, overrides={"evaluate_every": 10_000, "checkpoint_every": 10_000} | overrides)
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["evaluation"]


def wider(config):
    """Without dropout, and wide enough to learn fast."""
    qformer = replace(config.qformer, hidden_size=64, intermediate_size=128, num_heads=4, dropout=0.0)
    return replace(config, qformer=qformer)


def test_stage_1(write_recipe, rows, matching_model, tmp_path):
    torch.manual_seed(0)
    model = Blip2Matcher(wider(checkpoint.read_config(matching_model)))
    model.qformer.reset_parameters(std=0.1)
    checkpoint.save(model, tmp_path / "start", tokenizer=matching_model / "tokenizer.json")
    scores = learn(write_recipe(1, "start"), optim={"steps": 400, **OPTIM})
    assert min(scores["image_to_text"], scores["text_to_image"], scores["matching"]) > 0.9, scores
    assert scores["lm"] < 1.5, scores


def test_stage_2(write_recipe, rows, opt_model, tmp_path):
    torch.manual_seed(0)
    config = wider(checkpoint.read_config(opt_model))
    model = Blip2(replace(config, language=replace(config.language, hidden_size=64, num_heads=4)))
    model.qformer.reset_parameters(std=0.1)
    teach_to_speak(model, Tokenizer.from_folder(opt_model), read_rows([rows]))
    checkpoint.save(model, tmp_path / "start", tokenizer=opt_model / "tokenizer.json")
    data = {"texts_per_image": 4, "mix": {"captions": 0, "questions": 1, "dialogues": 0}}
    scores = learn(write_recipe(2, "start"), optim={"steps": 400, **OPTIM}, data=data)
    assert scores["question"] > 0.9, scores


def teach_to_speak(model, tokenizer, rows, steps=300):
    """A language model that answers questions about a description, which stands where the queries will stand."""
    language, config = model.language, model.config.language
    for name, parameter in language.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embedding" in name else 0.1)
    optimizer = torch.optim.AdamW(language.parameters(), lr=3e-3)
    num_queries = model.config.qformer.num_query_tokens
    chosen = [(row, turn) for row in rows for turn in row.questions]
    texts, starts = [], []
    for row, turn in chosen:
        described = (tokenizer.encode(row.questions[0].answer) * num_queries)[:num_queries]
        prompt = described + tokenizer.prompt_ids(question_prompt(turn.question, "opt"), config)
        texts.append(torch.tensor(prompt + tokenizer.answer_ids(turn.answer, config)))
        starts.append(len(prompt))
    text_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    is_answer_BT = torch.zeros_like(text_BT, dtype=torch.bool)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        is_answer_BT[row, start : len(text)] = True
    for _ in range(steps):
        logits_BTV = language.logits(language(language.embed(text_BT)))[:, :-1]
        loss = F.cross_entropy(logits_BTV[is_answer_BT[:, 1:]], text_BT[:, 1:][is_answer_BT[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1, "the language model itself did not learn to speak"
