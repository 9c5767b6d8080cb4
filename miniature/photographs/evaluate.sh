#!/usr/bin/env bash
# Every figure of README.md: scenes with held-out pairs and held-out cut-outs, and photographs that nothing was learnt
# from. Run by make.sh, or alone: miniature/photographs/evaluate.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=miniature/work/photographs
out=$work/scores
count=${COUNT:-300}   # scenes of each split
score() { "$python" -m miniature.photographs.score "$@"; }
blip2() { "$python" -m blip2 "$@"; }
mkdir -p "$out"

for split in familiar pairs stamps; do
  score rows "$work/$split/rows.jsonl" -o "$out/$split.jsonl" --count "$count"
  score rows "$work/$split/rows.jsonl" -o "$out/$split-captions.jsonl" --captions --count "$count"
  blip2 evaluate "$out/$split.jsonl" -o "$out/$split" --model photographs
  blip2 evaluate "$out/$split-captions.jsonl" -o "$out/$split-captions" --model photographs
done
for more in "" -captions; do
  score rows "$work/stamps/rows.jsonl" -o "$out/shuffled$more.jsonl" --shuffle --count "$count" ${more:+--captions}
  blip2 evaluate "$out/shuffled$more.jsonl" -o "$out/shuffled$more" --model photographs
  blip2 evaluate "$out/stamps$more.jsonl" -o "$out/ablation$more" --model "$work/ablation"
done
for more in -captions ""; do
  echo "== familiar$more" && score scenes "$out/familiar$more.jsonl" "familiar=$out/familiar$more"
  echo "== pairs$more" && score scenes "$out/pairs$more.jsonl" "unseen pairs=$out/pairs$more"
  echo "== stamps$more" && score scenes "$out/stamps$more.jsonl" "unseen cut-outs=$out/stamps$more" \
    "shuffled=$out/shuffled$more" "stage 2 alone=$out/ablation$more"
done

for rows in caption say exist; do
  blip2 evaluate "$work/photographs/$rows.jsonl" -o "$out/photographs-$rows" --model photographs
done
for rows in caption say; do
  echo "== photographs, $rows" && score photographs "$work/photographs/$rows.jsonl" "$out/photographs-$rows"
done
blip2 match "$work/photographs" --labels "$work/photographs/labels.txt" --top 32 --json --model photographs-itm \
  > "$out/matches.jsonl"
echo "== photographs, match --labels" && score labels "$out/matches.jsonl"
for split in large-stamps familiar; do
  blip2 match "$work/$split"/images/* --labels "$work/photographs/labels.txt" --top 32 --json \
    --model photographs-itm > "$out/$split-labels.jsonl"
  echo "== $split, match --labels" && score labels "$out/$split-labels.jsonl" "$work/$split/rows.jsonl"
done
echo "== photographs, the frozen features alone"
"$python" -m miniature.photographs.probe --packages "$work/packages" --work "$work"
echo "== wrong answers" && score wrong "$out/stamps.jsonl" "$out/stamps"
blip2 curves "$work/stage2" "$work/ablation" -o miniature/photographs/curves.svg
