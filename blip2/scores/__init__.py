"""Scores of captions and answers, equal to those of the official programs that published figures come from."""

from blip2.scores.answers import VQA_RULES, vqa_accuracy
from blip2.scores.captions import bleu, cider, rouge_l
from blip2.scores.samples import interval, paired, wilson

__all__ = ["VQA_RULES", "bleu", "cider", "interval", "paired", "rouge_l", "vqa_accuracy", "wilson"]
