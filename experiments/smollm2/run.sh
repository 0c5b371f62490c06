#!/usr/bin/env bash
# Every method on questions, articles, captions and their mixture, with SmolLM2-135M-Instruct; see README.md beside this file.
#
#   bash experiments/smollm2/run.sh            on one GPU; the same command again goes on where it was
#   REDUCED=1 bash experiments/smollm2/run.sh  every line on a CPU, in miniature; its numbers mean nothing
#
# Options, as NAME=VALUE before the command:
#   DATA     folder that holds squad/, cnn_dm/ and multi30k/, linked into data/; not needed where data/ has them
#   MODEL    folder of make_model.py, or a hub id; default runs/models/smollm2 if it is there, else the hub
#   PARTS    default "real_mixture squad cnn_dm captions"
#   METHODS  default "routes sleb none first random_skip unified_skip"; first_soft is the paper's own form of first,
#            one_size is routes by PuDDing's rule: routes of one size for each rate and no price, without LoRA
#   STEPS    optimizer steps of every run, whatever their kind; default 300
#   SEED     default 0
#   MINUTES  when they are over, what still runs is stopped, to be gone on with by the same command; default 25
#   JOBS     runs at a time; default: as many as fit the GPU's memory, 4 at most
#   RUNS     folder of the runs; default runs/smollm2
#   PYTHON   default python
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# Float32 products on the tensor cores of a GPU, several times as fast.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 TOKENIZERS_PARALLELISM=false
here=experiments/smollm2
reduced=${REDUCED:-}
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs/smollm2${reduced:+_reduced}} SEED=${SEED:-0}
export STEPS=${STEPS:-$([ -n "$reduced" ] && echo 5 || echo 300)}
PARTS=${PARTS:-real_mixture squad cnn_dm captions}
METHODS=${METHODS:-routes sleb none first random_skip unified_skip}
MODEL=${MODEL:-$([ -f runs/models/smollm2/config.json ] && echo runs/models/smollm2 || echo HuggingFaceTB/SmolLM2-135M-Instruct)}
GIB_PER_JOB=32 # LoRA on 16 sequences of 700 tokens in float32, by estimate

die() { echo "error: $*" >&2; exit 2; }

# One part and method, at all rates: a sweep of one to three runs, which does what is not finished.
job() {
  local part=$1 method=$2 size rates=$RATES
  local half=$((STEPS / 2)) fifth=$((STEPS / 5))
  local options=(data="$part" method="$method")
  case $part in
    squad | cnn_dm) options+=(data.root="data/$part") ;;
  esac
  # All methods of a table train for as many steps. Those that choose on prompts do so on a tuned model.
  case $method in
    none) options+=('phases=[lora,evaluate]' lora_phase.max_steps="$STEPS") ;;
    random_skip | unified_skip)
      options+=('phases=[lora,evaluate]' lora_phase.max_steps="$STEPS" method.target_skip="$rates") ;;
    sleb)
      options+=('phases=[tune,choose,lora,evaluate]' lora_phase.max_steps="$half" method.target_skip="$rates") ;;
    first | first_soft) # LoRA from scratch changes what the routers read, hence the refit
      options+=('phases=[tune,choose,lora,refit,evaluate]' lora_phase.max_steps="$((2 * fifth))")
      options+=(router_phase.max_steps="$((STEPS - 4 * fifth))" method.target_skip="$rates") ;;
    routes) # one adapter for all rates; rate 0 is the dense model as the choice and the adapter find and leave it
      options+=('phases=[tune,choose,lora,refit,evaluate]' lora_phase.max_steps="$half")
      options+=(evaluation.skip_rates="[0.0,$OTHER_RATES]") ;;
    one_size)
      options=(data="$part" method=routes note=one_size router.price=size method.sizes=1 "${options[@]:2}")
      options+=('phases=[tune,choose,evaluate]' lora_phase.max_steps="$half" method.target_skip="$rates")
      options+=('method.highest_skip=${method.target_skip}') ;;
    *) die "METHODS: $method is none of routes, sleb, none, first, first_soft, one_size, random_skip, unified_skip" ;;
  esac
  [ "$method" = first_soft ] && options+=(router.input_norm=none router_phase.loss_on=all method.calibrate_rate=true)
  # Kinds of prompts are what a mixture's routers can tell apart.
  [ "$part-$method" = real_mixture-first ] && options+=(method.start=codebook)
  read -ra size <<<"$SIZES"
  case $method in
    sleb) read -ra size <<<"$SIZES ${SEARCH:-}" ;;
    first | first_soft) read -ra size <<<"$SIZES ${SEARCH:-} ${FIRST:-}" ;;
    routes) read -ra size <<<"$SIZES ${SEARCH:-} ${ROUTES:-}" ;;
    one_size) read -ra size <<<"$SIZES ${SEARCH:-} ${ONE_SIZE:-}" ;;
  esac
  local log="$RUNS/logs/$part-$method.log" left=$((DEADLINE - $(date +%s)))
  [ "$left" -gt 0 ] || { echo "left for later: $part, $method"; return 1; }
  # shellcheck disable=SC2086
  timeout --foreground --signal=TERM --kill-after=60 "$left" $PYTHON -m firstlab.train --multirun model=smollm2 model.path="$MODEL" \
    compare_with_base=false sweep.recorded=null runs="$RUNS" seed="$SEED" trainer.progress_bar=false "${size[@]}" \
    lora_phase.epochs=1000 lora_phase.patience=null router_phase.epochs=1000 evaluation.tpot_prompts=0 \
    "${options[@]}" >>"$log" 2>&1
  local status=$?
  case $status in
    0) echo "done: $part, $method" ;;
    124 | 130) echo "stopped, to be gone on with: $part, $method" ;;
    *) echo "failed: $part, $method; see $log" ;;
  esac
  return $status
}

if [ "${1:-}" = job ]; then
  job "$2" "$3"
  exit
fi

linked() { # FOLDER FILE...: the files of a data set are in data/FOLDER, or linked there from DATA
  local folder=$1 file
  shift
  if [ ! -e "data/$folder" ] && [ -n "${DATA:-}" ] && [ -d "$DATA/$folder" ]; then
    mkdir -p data
    ln -s "$(realpath "$DATA/$folder")" "data/$folder"
  fi
  for file in "$@"; do
    [ -f "data/$folder/$file" ] || die "data/$folder/$file is missing; put it there, or set DATA to a folder that holds $folder/$file"
  done
}

for part in $PARTS; do
  case $part in
    real_mixture | squad | cnn_dm | captions) ;;
    *) die "PARTS: $part is none of real_mixture, squad, cnn_dm, captions" ;;
  esac
  [[ $part =~ real_mixture|squad ]] && linked squad train-v1.1.json dev-v1.1.json
  [[ $part =~ real_mixture|cnn_dm ]] && linked cnn_dm train.jsonl test.jsonl
  [[ $part =~ real_mixture|captions ]] && linked multi30k {train,val,test_2016_flickr}.{en,de}
done
# shellcheck disable=SC2086
$PYTHON -c "import firstlab" || die "PYTHON=$PYTHON cannot import firstlab or one of its packages"

if [ -n "$reduced" ]; then
  RATES=0.05
  OTHER_RATES=0.03
  JOBS=${JOBS:-1}
  SIZES="trainer=cpu data.train_size=24 data.val_size=3 data.max_length_router=160 data.max_length_lora=160"
  SIZES+=" data.max_prompt_length=160 data.max_new_tokens=6 lora_phase.batch_size=1 router_phase.batch_size=1"
  SIZES+=" evaluation.limit=3 evaluation.batch_size=4 evaluation.resamples=100"
  SEARCH="method.calibration_prompts=4"
  FIRST="method.fit_prompts=8 method.codebook_size=2"
  ROUTES="method.fit_prompts=16 method.target_skip=0.05 method.highest_skip=0.066 method.sizes=1 method.swaps=1"
  ONE_SIZE="method.fit_prompts=16 method.swaps=1"
  MINUTES=${MINUTES:-600}
  collect=$RUNS/records
else
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # of each of the processes that share the CPU
  RATES=0.15,0.25,0.35
  OTHER_RATES=0.15,0.35 # beside the rate of method.target_skip
  free=$($PYTHON -c "import torch; print(torch.cuda.mem_get_info()[0] >> 30)" 2>/dev/null) ||
    die "no CUDA device; REDUCED=1 runs every line on a CPU, in miniature"
  fit=$((free / GIB_PER_JOB))
  JOBS=${JOBS:-$((fit > 4 ? 4 : fit < 1 ? 1 : fit))}
  SIZES="trainer=gpu trainer.prompt_cache_mib=4096 data.train_size=3000 data.val_size=192 lora_phase.learning_rate=3e-4"
  SIZES+=" lora_phase.validate_every=50 lora_phase.checkpoint_every=50 router_phase.validate_every=20"
  SIZES+=" router_phase.checkpoint_every=20 evaluation.limit=300 evaluation.batch_size=100"
  SEARCH=
  FIRST=
  ROUTES="method.swaps=4" # half of the default: measuring them is most of the fit
  ONE_SIZE=
  MINUTES=${MINUTES:-25}
  collect=$here
fi
DEADLINE=$(($(date +%s) + 60 * MINUTES))
export RATES OTHER_RATES SIZES SEARCH FIRST ROUTES ONE_SIZE MODEL DEADLINE
mkdir -p "$RUNS/logs"

echo "model $MODEL, $STEPS steps, $JOBS at a time, at most $MINUTES minutes; logs in $RUNS/logs"
# What takes longest, and says most, comes first.
for method in $METHODS; do
  for part in $PARTS; do echo "$part $method"; done
done | xargs -P "$JOBS" -L 1 bash "$0" job
status=$?
# shellcheck disable=SC2086
$PYTHON $here/report.py "$RUNS" "$collect" || status=1
[ "$status" = 0 ] || echo "not everything is finished; the same command goes on where it was"
exit "$status"
