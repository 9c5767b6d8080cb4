#!/usr/bin/env bash
# A second round after make.sh, not yet in the bundled weights (README.md, "What was tried"): the image encoder sees
# crowds and strangers, and both stages are done once more behind it. Stopped and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=miniature/work
allocator=$(ls /usr/lib/*/libtcmalloc_minimal.so.4 2>/dev/null | head -n 1 || true)
if [ -n "$allocator" ]; then export LD_PRELOAD=$allocator; fi

for pictures in "crowd crowd 60000 4" "varied varied 20000 5"; do
  read -r name split count seed <<<"$pictures"
  [ -f "$work/$name/rows.jsonl" ] || "$python" -m miniature.world --split "$split" --count "$count" --seed "$seed" --out "$work/$name"
done

"$python" -m miniature.pretrain vision --data "$work/crowd" "$work/varied" --test "$work/test" \
  --start "$work/vision.pt" --out "$work/vision-third.pt" --steps 4000 --threads 1
"$python" -m miniature.pretrain renew --out "$work"
"$python" -m blip2 train miniature/again1.toml
"$python" -m blip2 train miniature/again2.toml
"$python" -m miniature.evaluate --model "$work/again2" --count 1000 --drawings
"$python" -m miniature.retrieval --model "$work/again1"
