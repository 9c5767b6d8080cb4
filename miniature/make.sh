#!/usr/bin/env bash
# Makes the bundled miniature from nothing: pictures, frozen parts, the two stages, the results. Hours on two cores;
# stopped and started again, it goes on where it was. Run from the repository's root, inside its environment.
# Needs Debian's fonts-noto-color-emoji; libtcmalloc-minimal4, if there, makes training up to twice as fast.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=miniature/work
mkdir -p "$work"
allocator=$(ls /usr/lib/*/libtcmalloc_minimal.so.4 2>/dev/null | head -n 1 || true)
if [ -n "$allocator" ]; then export LD_PRELOAD=$allocator; fi

for pictures in "train train 60000 1" "more train 90000 3" "test test 2000 2"; do
  read -r name split count seed <<<"$pictures"
  [ -f "$work/$name/rows.jsonl" ] || "$python" -m miniature.world --split "$split" --count "$count" --seed "$seed" --out "$work/$name"
done

# The two frozen parts know nothing of each other: one core each.
(
  "$python" -m miniature.pretrain vision --data "$work/train" --test "$work/test" \
    --out "$work/vision-first.pt" --steps 3500 --threads 1
  "$python" -m miniature.pretrain vision --data "$work/train" "$work/more" --test "$work/test" \
    --start "$work/vision-first.pt" --out "$work/vision.pt" --steps 1800 --threads 1
) &
vision=$!
"$python" -m miniature.pretrain language --out "$work/language.pt" --steps 5500 --documents 60000 --threads 1
wait "$vision"
"$python" -m miniature.pretrain assemble --out "$work"

"$python" -m blip2 train miniature/stage1.toml
"$python" -m blip2 train miniature/stage2.toml
"$python" -m blip2 train miniature/ablation.toml   # stage 2 without stage 1, for the comparison
"$python" -m miniature.bundle "$work" blip2/miniature
"$python" -m miniature.evaluate --count 1000 --against "stage 2 alone=$work/ablation" --markdown miniature/results.md
