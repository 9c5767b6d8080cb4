#!/usr/bin/env bash
# Makes the second miniature from nothing but packages of Debian and PyPI: `make photographs`. About two hours on one
# core; stopped and started again, it goes on where it was. Run from the repository's root, inside its environment.
# Needs apt-get and dpkg-deb; libtcmalloc-minimal4, if there, makes training up to twice as fast.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
recipes=miniature/photographs
work=miniature/work/photographs
mkdir -p "$work"
allocator=$(ls /usr/lib/*/libtcmalloc_minimal.so.4 2>/dev/null | head -n 1 || true)
if [ -n "$allocator" ]; then export LD_PRELOAD=$allocator; fi

"$python" -m miniature.photographs.packages --out "$work/packages"
for scenes in "train 8000 1" "large 24000 1" "familiar 300 2" "pairs 300 2" "stamps 300 2" "large-stamps 300 2"; do
  read -r split count seed <<<"$scenes"
  [ -f "$work/$split/rows.jsonl" ] || "$python" -m miniature.photographs.world --packages "$work/packages" \
    --split "$split" --count "$count" --seed "$seed" --out "$work/$split"
done
[ -f "$work/photographs/labels.txt" ] || "$python" -m miniature.photographs.things --packages "$work/packages" \
  --out "$work/photographs"

parts() { "$python" -m miniature.photographs.parts "$1" --packages "$work/packages" --out "$work"; }
[ -f "$work/start-matching/config.json" ] || parts matching
if [ ! -f "$work/language.done" ]; then   # language.pt is there before it is done
  parts language
  touch "$work/language.done"
fi
[ -f "$work/start-generative/config.json" ] || parts generative
"$python" -m blip2 train $recipes/stage1.toml
"$python" -m blip2 train $recipes/stage2.toml
"$python" -m blip2 train $recipes/ablation.toml   # stage 2 without stage 1, for the comparison
"$python" -m miniature.photographs.bundle "$work"
bash $recipes/evaluate.sh
