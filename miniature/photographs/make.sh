#!/usr/bin/env bash
# Makes the second miniature from nothing but packages of Debian and PyPI: `make photographs`. README.md says how long it
# takes; stopped and started again, it goes on where it was. Run from the repository's root, inside its environment.
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

parts=("$python" -m miniature.photographs.parts --packages "$work/packages" --out "$work")
train=("$python" -m blip2 train)
# Each training uses one thread, and so does what runs beside it: threads of two that wait for each other take eight times
# as long.
beside=   # a process that runs beside another one, and ends with this script, also after Ctrl-C
trap '[ -z "$beside" ] || kill "$beside" 2>/dev/null || true' EXIT

[ -f "$work/start-matching/config.json" ] || "${parts[@]}" matching
if [ ! -f "$work/language.done" ]; then   # language.pt is there before it is done
  echo "beside the next training: the language model ($work/language.log)"
  OMP_NUM_THREADS=1 "${parts[@]}" language > "$work/language.log" 2>&1 &
  beside=$!
fi
"${train[@]}" $recipes/words.toml
[ -z "$beside" ] || wait "$beside"
touch "$work/language.done"
beside=
"${train[@]}" $recipes/stage1.toml
[ -f "$work/start-generative/config.json" ] || "${parts[@]}" generative
echo "beside stage 2: its ablation, without stage 1 ($work/ablation.log)"
"${train[@]}" $recipes/ablation.toml > "$work/ablation.log" 2>&1 &
beside=$!
"${train[@]}" $recipes/stage2.toml
wait "$beside"
beside=
"$python" -m miniature.photographs.bundle "$work"
bash $recipes/evaluate.sh
