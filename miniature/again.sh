#!/usr/bin/env bash
# A second round, from the weights that make.sh left in blip2/miniature (or others of that kind, START): the image encoder
# sees crowds and strangers, the language model reads questions as people also type them, and stage 2 is trained once
# more between the two. Two hours on two cores; started again, it resumes. Needs what make.sh needs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
start=${START:-blip2/miniature}
work=miniature/work
mkdir -p "$work"
allocator=$(ls /usr/lib/*/libtcmalloc_minimal.so.4 2>/dev/null | head -n 1 || true)
if [ -n "$allocator" ]; then export LD_PRELOAD=$allocator; fi

for images in "crowd crowd 60000 4" "varied varied 40000 5" "test test 2000 2"; do
  read -r name split count seed <<<"$images"
  [ -f "$work/$name/rows.jsonl" ] || "$python" -m miniature.world --split "$split" --count "$count" --seed "$seed" --out "$work/$name"
done

# The two frozen parts, one core each.
"$python" -m miniature.pretrain vision --data "$work/crowd" "$work/varied" --test "$work/test" \
  --start "$start/generative" --out "$work/vision-third.pt" --steps 2400 --threads 1 &
vision=$!
"$python" -m miniature.pretrain language --start "$start/generative" --out "$work/language-second.pt" \
  --steps 1600 --documents 40000 --threads 1
wait "$vision"
"$python" -m miniature.pretrain renew --start "$start/generative" --out "$work"

"$python" -m blip2 train miniature/again2.toml
"$python" -m miniature.bundle "$work" blip2/miniature --round again
"$python" -m miniature.evaluate --count 1000 --drawings --markdown miniature/results.md
