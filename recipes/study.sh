#!/usr/bin/env bash
# The study: does distillation help a small block diffusion model, and which parts of it do? Five seeds, on this
# machine's own Python library (the quickstart's corpus, split by function); hypotheses registered here, in advance.
#
#   teacher   one, pretrained on all of the train split. The seeds are the student's: initial weights, its pretraining
#             on a tenth of the split, data order and noise. Intervals are over students and samples, given this teacher
#   tuning    on the validation split with a seed of its own; denoising only has more trials, and may stop earlier
#   seeds     one start each, and every arm from it, with the same data, data order and noise (masks sampled by chunk,
#             a stratified timestep per block, exact counts); TIDE-Cross and TIDE-Shared with the published attention
#   results   bits per byte of the test split, which nothing was chosen on: differences with 95 % intervals over seeds
#             and samples, and two-sided p, Holm-corrected over all hypotheses below (megatron_tide/evaluate/study.py):
#             results/study.json, results/study.png and results/index.html
#
# Machine:  SIZE=cpu: 2 cores, about 2 h 30 min. SIZE=gpu: larger models, one GPU, sized for ten minutes (not measured).
# Launch:   bash recipes/study.sh                  a second run skips what has finished; --fresh starts over
#           DRY_RUN=1 bash recipes/study.sh        print the commands, and the time they should take

set -euo pipefail

# --- registered before the first run: "A < B" says that arm A has fewer bits per byte on the test split than arm B ---
# To add an arm, add its line and its hypothesis. To come: H10 with the row of an autoregressive teacher < without it.
hypotheses=(
  "H1  tide-cross < bd3lm: TIDE-Cross against denoising only"
  "H2  tide-shared < bd3lm: TIDE-Shared, in its published form across tokenizers, against denoising only"
  "H3  tide-bridge < tide-cross: one-to-one rows by KL, others by Bernoulli KL, against TIDE-Cross"
  "H4  tide-bridge < full-context: a teacher that sees what the student sees, against full attention"
  "H5  tide-bridge < expand: masking sampled by chunk, against expanded to chunks"
  "H6  tide-bridge < one-timestep: one timestep per block, against one per sample"
  "H7a compdemo < tide-bridge: with CompDemo, against without"
  "H7b tidal < tide-bridge: with TIDAL, against without"
  "H8  byte-prefix < tide-bridge: first rows of all chunks by byte prefixes, weighted as denoising, against one-to-one rows"
)
# A comparison of its own, which H9=1 adds to a study, also to one that has ended: both arms are tide-bridge with its
# tuned settings, for as many samples as there, in four rounds of rows of the same corpus; in one of them the student
# answers half of each round's rows (temperature 1), which the teacher then judges, and which are not denoised.
on_policy="H9  on-policy < off-policy: half of the samples with the student's own answers, against the corpus alone"
# Name, whose tuned settings, and the flags in which arms that share settings differ.
plain="--strategy tide-bridge --teacher-context staircase --tidal off --no-compdemo"
arms=(
  "bd3lm        bd3lm       --strategy bd3lm"
  "tide-cross   tide-cross  --strategy tide-cross"
  "tide-shared  tide-shared --strategy tide-shared"
  "tide-bridge  tide-bridge $plain"
  "full-context tide-bridge $plain --teacher-context full"
  "expand       tide-bridge $plain --masking expand"
  "one-timestep tide-bridge $plain --timesteps sample"
  "compdemo     tide-bridge $plain --compdemo"
  "tidal        tide-bridge --strategy tide-bridge --teacher-context staircase --no-compdemo"
  "byte-prefix  tide-bridge $plain --distribution-rows byte_prefix"
)

# Arms of chunk likelihoods alone: no setting that is tuned changes what their teacher is asked, so it is asked once. An
# answer to distributions depends on the temperature, and the seeds' arms differ in noise or attention.
asked_once="tide-cross tide-shared"

# --- settings: edit here, or set them in the environment ---
SIZE=${SIZE:-cpu}
NAME=${NAME:-study_$SIZE}
SEEDS=${SEEDS:-1 2 3 4 5}
TUNING_SEED=${TUNING_SEED:-101}
case $SIZE in # steps of teacher, start and each arm; samples per step; test samples; precision; folder of shapes
  cpu) sizes=(900 600 400 8 160 fp32 recipes/quickstart) ;;
  gpu) sizes=(800 600 120 32 320 bf16 recipes/study) ;;
  *) sizes=() ;;
esac
TEACHER_STEPS=${TEACHER_STEPS:-${sizes[0]:-}}
STUDENT_STEPS=${STUDENT_STEPS:-${sizes[1]:-}}
DISTILL_STEPS=${DISTILL_STEPS:-${sizes[2]:-}}
BATCH=${BATCH:-${sizes[3]:-}}
EVAL_SAMPLES=${EVAL_SAMPLES:-${sizes[4]:-}}
precision=${sizes[5]:-} shapes=${sizes[6]:-}
H9=${H9:-0}             # 1: the comparison of on-policy rounds too
STUDENT_BLOCK=${STUDENT_BLOCK:-8}
LENGTH=${LENGTH:-256}   # of student and teacher, in tokens; longer responses are cut at a chunk boundary
# What tuning tries, each from the best so far: the learning rate, then T, then the weight (both from 2). TIDE-Shared
# keeps its published T and weight; denoising only, which overfits, has all pairs of a learning rate and steps.
LRS=${LRS:-1e-3 3e-3 8e-3}
LRS_BD3LM=${LRS_BD3LM:-5e-4 1e-3 2e-3 4e-3}
STEPS_BD3LM=${STEPS_BD3LM:-} # empty: a quarter, a half and all of DISTILL_STEPS
temperatures=(1 5) weights=(1 4)
# ---

# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
((${#sizes[@]} > 0)) || fail "SIZE=$SIZE: use cpu or gpu"
switch H9 "1 adds the comparison of on-policy rounds, 0 does not"
FRESH=0
[[ ${1:-} == --fresh ]] && { FRESH=1; shift; }
(($# == 0)) || fail "unknown argument '$1': recipes/study.sh takes only --fresh (settings: top of the file)"
check_numbers TEACHER_STEPS STUDENT_STEPS DISTILL_STEPS BATCH EVAL_SAMPLES
STEPS_BD3LM=${STEPS_BD3LM:-$((DISTILL_STEPS / 4)) $((DISTILL_STEPS / 2)) $DISTILL_STEPS}
read -ra seeds <<<"$SEEDS"
((${#seeds[@]} > 1)) || fail "SEEDS=\"$SEEDS\": intervals over seeds need two seeds or more"
setup_environment requirements.txt
((FRESH == 0)) || remove_run

quiet_noise=(--masking synchronous --timesteps block --timestep-sampling stratified --mask-count exact)
common=(--precision "$precision" --global-batch-size "$BATCH" --micro-batch-size "$BATCH" --beta2 0.98
  --save-every 500 --keep-last 1 --log-every 20 "${quiet_noise[@]}")
pretraining=("${common[@]}" --strategy bd3lm --pretraining "ar:0.3,joint:0.4" --score-prompt --optimizer muon
  --muon-lr 0.05 --lr 1e-2 --lr-schedule linear --lr-decay-share 0.5)
distilling=("${common[@]}" --data "$run/data-train_tenth" --bridge "$run/bridge" --teacher "$run/teacher"
  --teacher-dtype "$precision")
EXPECTED_SECONDS=

# timed SECONDS STAGE COMMAND...: a stage, and how long it takes on 2 cores with SIZE=cpu. Trainings of a stage share
# one process (--then); each continues where it was stopped, and one that has finished takes seconds.
timed() {
  [[ $SIZE != cpu ]] || EXPECTED_SECONDS+="$2=$1 "
  stage "${@:2}"
}

data() {
  local pair=(--student "$run/tokenizers/student" --teacher "$run/tokenizers/teacher") split words=()
  local lengths=(--student-length "$LENGTH" --student-block "$STUDENT_BLOCK") corpus=$run/corpus first=$run/pretraining
  for split in train_tenth validation test; do
    words+=(--then prepare --data "$corpus/$split.jsonl" "${pair[@]}" --bridge "$run/bridge" "${lengths[@]}"
      --teacher-length "$LENGTH" --teacher-block "$STUDENT_BLOCK" --out "$run/data-$split")
  done
  timed 15 corpus "$PYTHON" -m megatron_tide corpus --out "$corpus" \
    --then train-tokenizers --data "$corpus/train.jsonl" --student-out "${pair[1]}" --teacher-out "${pair[3]}"
  timed 20 data "$PYTHON" -m megatron_tide sample --data "$corpus/train_tenth.jsonl" --out "$run/sample.jsonl" \
    --then bridge "${pair[@]}" --sample "$run/sample.jsonl" --out "$run/bridge" "${words[@]}" \
    --then prepare --data "$corpus/train.jsonl" --student "${pair[3]}" "${lengths[@]}" --out "$first/teacher-data" \
    --then prepare --data "$corpus/train_tenth.jsonl" --student "${pair[1]}" "${lengths[@]}" --out "$first/student-data"
}

# pretrain SECONDS STAGE WHO SEED STEPS: WHO (student or teacher) from random weights -> $run/STAGE, in hub format
pretrain() {
  local out=$run/pretraining/$2 init=$run/pretraining/$2-init data=$run/pretraining/$3-data
  timed "$1" "$2" "$PYTHON" -m megatron_tide init-model --config "$shapes/$3.json" --block-size "$STUDENT_BLOCK" \
    --tokenizer "$run/tokenizers/$3" --seed "$4" --out "$init" --fresh \
    --then distill --out "$out" --student "$init" --data "$data" --seed "$4" "${pretraining[@]}" --max-steps "$5" \
    --then convert "$out" "$run/$2" --dtype float32 --overwrite --skip-parity
}

# arm NAME: its line of the table, as `whose` (settings) and `flags`.
arm() {
  local line name
  for line in "${arms[@]}"; do
    read -r name whose flags <<<"$line"
    [[ $name != "$1" ]] || break
  done
  read -ra flags <<<"$flags"
}

# tune SECONDS NAME ROUND TRIAL...: arm NAME with each TRIAL (a string of flags), from the best settings of the rounds
# before; the best of all trials of NAME goes to tuning/NAME/best-ROUND.json. SECONDS: of one trial.
# Trials of an arm of asked_once train from the same answers of the teacher, which are the numbers of the teacher itself.
tune() {
  local name=$2 round=$3 folder=$run/tuning/$2 seconds=$(($1 * ($# - 3))) words=() scored=() cached=() trial out whose flags more
  arm "$name"
  [[ $name == "${tuned:-}" ]] || rounds=() tuned=$name
  ((${#rounds[@]} == 0)) || flags+=(--config "$best")
  local shared=(--student "$run/start-$TUNING_SEED" --seed "$TUNING_SEED" "${distilling[@]}" "${flags[@]}")
  if [[ " $asked_once " == *" $name "* ]]; then
    cached=(--teacher-hosting cached --teacher-cache "$folder/answers")
    read -ra more <<<"$4"
    if ((${#rounds[@]} == 0)); then
      words=(cache --out "$folder/answers" "${shared[@]}" "${more[@]}" --then)
      seconds=$((seconds + DISTILL_STEPS / 6))
    fi
  fi
  for trial in "${@:4}"; do
    out=${trial//--/} out=$folder/${out// /-}
    read -ra more <<<"$trial"
    words+=(distill --out "$out" "${shared[@]}" ${cached[@]+"${cached[@]}"} "${more[@]}" --then)
    scored+=(--student "$out")
  done
  rounds+=("$folder/round-$round.json")
  timed "$seconds" "tune-$name-$round" "$PYTHON" -m megatron_tide "${words[@]}" evaluate \
    --data "$run/data-validation" --samples "$EVAL_SAMPLES" --likelihood-noise block --mc-samples 4 "${scored[@]}" --json "${rounds[@]: -1}"
  best=$folder/best-$round.json
  timed 1 "choose-$name-$round" "$PYTHON" recipes/study/choose.py "${rounds[@]}" --out "$best"
}

tuning() {
  local best='' tuned='' rounds=() trials=() lr steps name lrs pace
  local first="--max-steps $DISTILL_STEPS --temperature 2 --distill-weight"
  for lr in $LRS_BD3LM; do
    for steps in $STEPS_BD3LM; do trials+=("--lr $lr --max-steps $steps"); done
  done
  tune $((DISTILL_STEPS / 11 + 9)) bd3lm last "${trials[@]}"
  read -ra lrs <<<"$LRS"
  tune $((DISTILL_STEPS / 8 + 9)) tide-shared last "${lrs[@]/#/$first 1 --lr }"
  for name in tide-cross tide-bridge; do
    pace=4 # steps per second
    [[ " $asked_once " != *" $name "* ]] || pace=8
    tune $((DISTILL_STEPS / pace + 9)) "$name" 1 "${lrs[@]/#/$first 2 --lr }"
    tune $((DISTILL_STEPS / pace + 9)) "$name" 2 "${temperatures[@]/#/--temperature }"
    tune $((DISTILL_STEPS / pace + 9)) "$name" last "${weights[@]/#/--distill-weight }"
  done
}

# seed SEED: all arms from one start, and their scores.
seed() {
  local s=$1 words=() scored=() line name whose flags
  pretrain $((STUDENT_STEPS / 9 + 15)) "start-$s" student "$s" "$STUDENT_STEPS"
  for line in "${arms[@]}"; do
    name=${line%% *}
    arm "$name"
    words+=(distill --out "$run/seed-$s/$name" --config "$run/tuning/$whose/best-last.json" --student "$run/start-$s"
      --seed "$s" "${distilling[@]}" "${flags[@]}" --then)
    scored+=(--student "$run/seed-$s/$name")
  done
  timed $((DISTILL_STEPS * 13 / 5 + 140)) "seed-$s" "$PYTHON" -m megatron_tide "${words[@]}" evaluate \
    --data "$run/data-test" --samples "$EVAL_SAMPLES" --likelihood-noise block --student start="$run/start-$s" "${scored[@]}" \
    --teacher "$run/teacher" --baseline bd3lm --per-sample --json "$run/seed-$s/scores.json"
}

# in_rounds SEED: the two arms of H9 from one start, and their scores.
in_rounds() {
  local s=$1 words=() scored=() one name whose flags number now from=() out parts=4
  arm tide-bridge
  for one in on-policy=0.5 off-policy=0; do
    name=${one%=*} now=$run/start-$s from=()
    for ((number = 1; number <= parts; number++)); do
      out=$run/seed-$s/$name/round-$number
      words+=(rollout "$now" --data "$run/corpus/train_tenth.jsonl" --round "$number" --share "${one#*=}" --seed "$s"
        --samples $((DISTILL_STEPS * BATCH / parts / 2)) --student-length "$LENGTH" --temperature 1 --out "$out-answers"
        --then prepare --data "$out-answers/mixture.json" --student "$run/tokenizers/student" --teacher "$run/tokenizers/teacher"
        --bridge "$run/bridge" --student-length "$LENGTH" --student-block "$STUDENT_BLOCK" --teacher-length "$LENGTH"
        --teacher-block "$STUDENT_BLOCK" --out "$out-data"
        --then distill --out "$out" --config "$run/tuning/$whose/best-last.json" --student "$run/start-$s" --seed "$s"
        "${distilling[@]}" "${flags[@]}" --data "$out-data" --max-steps "$DISTILL_STEPS"
        --until-step $((number * DISTILL_STEPS / parts)) ${from[@]+"${from[@]}"} --then)
      now=$out from=(--continue-from "$out")
    done
    scored+=(--student "$name=$out")
  done
  timed $((DISTILL_STEPS / 2 + 200)) "on-policy-$s" "$PYTHON" -m megatron_tide "${words[@]}" evaluate \
    --data "$run/data-test" --samples "$EVAL_SAMPLES" --likelihood-noise block --student start="$run/start-$s" "${scored[@]}" \
    --baseline off-policy --per-sample --json "$run/seed-$s/on-policy.json"
}

main() {
  local s one scores=() own=() expected=0
  data
  pretrain $((TEACHER_STEPS * 2 / 9 + 15)) teacher teacher "$TUNING_SEED" "$TEACHER_STEPS"
  pretrain $((STUDENT_STEPS / 9 + 15)) "start-$TUNING_SEED" student "$TUNING_SEED" "$STUDENT_STEPS"
  tuning
  for s in "${seeds[@]}"; do
    seed "$s"
    scores+=("$run/seed-$s/scores.json")
  done
  timed 8 results "$PYTHON" recipes/study/results.py "${scores[@]}" "${hypotheses[@]/#/--hypothesis=}" --size "$SIZE" \
    --tuning "$run/tuning" --out "$run/results"
  if [[ $H9 == 1 ]]; then
    for s in "${seeds[@]}"; do
      in_rounds "$s"
      own+=("$run/seed-$s/on-policy.json")
    done
    timed 8 results-on-policy "$PYTHON" recipes/study/results.py "${own[@]}" --hypothesis="$on_policy" --size "$SIZE" \
      --tuning "$run/tuning" --out "$run/results-on-policy"
  fi
  [[ $DRY_RUN == 1 && -n $EXPECTED_SECONDS ]] || return 0
  for one in $EXPECTED_SECONDS; do expected=$((expected + ${one#*=})); done
  printf '# expected on 2 cores: %d minutes\n' $((expected / 60))
}
# On one line, because bash reads a script while it runs it, and this file may be edited before it has finished.
main; exit
