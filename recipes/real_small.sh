#!/usr/bin/env bash
# Real weights on a small machine: SmolLM2-135M-Instruct -> block diffusion model -> teacher of students with fewer layers.
#
#   corpus      docstring -> code pairs of this machine's own Python standard library, split by function (as in the quickstart)
#   adaptation  the autoregressive model becomes a block diffusion model by denoising only; ADAPTATIONS="bd3lm kl": once more
#               with its own left-to-right distributions as the teacher's
#   small       a student made of some of its layers, distilled with each of STRATEGIES from the same start, data and noise;
#               denoising only and the first strategy with a teacher once for each of SEEDS
#   scores      held-out bits per byte of all of them and of the autoregressive model, and their completions, judged
# Output:    runs/real_small/hf (the adapted model), runs/real_small/hf_small (the first of STRATEGIES that has a teacher),
#            scores.json with all completions, report.json, picture.png, report/index.html
# Machine:   SIZE=cpu: 2 cores, 10 GiB; 8 samples of the adaptation take about 5.2 s with AVX-512's bf16, 4.4 s with AMX.
#            DRY_RUN=1 adds up the former: most is the number of steps, strategies and SEEDS. SIZE=gpu: one GPU of 24 GB.
# Launch:    bash recipes/real_small.sh
#            SOURCE=SmolLM2-135M-Instruct.gguf bash recipes/real_small.sh     no hub: a GGUF file of the model
#            SIZE=gpu bash recipes/real_small.sh
#            DRY_RUN=1 bash recipes/real_small.sh                  print the commands, and the time they should take
# A second run skips finished stages; --fresh starts over.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-real_small}
SIZE=${SIZE:-cpu}                                       # cpu or gpu: number of steps, samples per step
SOURCE=${SOURCE:-HuggingFaceTB/SmolLM2-135M-Instruct}   # hub name, folder in hub format, or .gguf file
MASK_TOKEN=${MASK_TOKEN-<reponame>}                     # a token of its vocabulary that no text becomes
BLOCK=${BLOCK:-4}
STUDENT_LENGTH=${STUDENT_LENGTH:-220}                   # in tokens; longer responses are cut
PRETRAINING=${PRETRAINING-}                             # phases before, such as ar:0.1,joint:0.3; in so few steps they cost more than they give
NOISE=${NOISE---timesteps block --timestep-sampling stratified --mask-count exact}   # flags of every training; empty: published noise
KEEP_LAYERS=${KEEP_LAYERS:-2/3}                         # layers of the small student: two thirds, without those in the middle
STRATEGIES=${STRATEGIES:-bd3lm kl}                      # bd3lm (denoising only) first; the tokenizers are equal: tide-shared fits, tide-bridge is kl
TEMPERATURE=${TEMPERATURE:-1}                           # of every distillation objective
ROWS=${ROWS:-byte_prefix}                               # --distribution-rows: weighted as denoising is; pairs: averaged over chunks
LR=${LR:-3e-4}
SEEDS=${SEEDS:-42 43 44}                                # of data order and noise; the first also of the adaptation
ADAPTATIONS=${ADAPTATIONS:-bd3lm}                       # bd3lm: denoising only; beside it kl: its own left-to-right row is the teacher's
ADAPT_FLAGS=${ADAPT_FLAGS:-}                            # more flags for each of these
PRECISION=${PRECISION:-}                                # bf16 or fp32; empty: bf16 on a GPU, and on a CPU that has instructions for it
case $SIZE in # steps of each adaptation and of each distillation, samples per step, test samples, timesteps of each, completions
  cpu) sizes=(600 160 4 100 4 50) ;;
  gpu) sizes=(1500 800 32 400 8 50) ;;
  *) sizes=() ;;
esac
ADAPT_STEPS=${ADAPT_STEPS:-${sizes[0]:-}}
DISTILL_STEPS=${DISTILL_STEPS:-${sizes[1]:-}}
BATCH=${BATCH:-${sizes[2]:-}}
EVAL_SAMPLES=${EVAL_SAMPLES:-${sizes[3]:-}}
MC_SAMPLES=${MC_SAMPLES:-${sizes[4]:-}}
COMPLETIONS=${COMPLETIONS:-${sizes[5]:-}}
# ---

# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
((${#sizes[@]} > 0)) || fail "SIZE=$SIZE: use cpu or gpu"
FRESH=0
[[ ${1:-} == --fresh ]] && { FRESH=1; shift; }
(($# == 0)) || fail "unknown argument '$1': recipes/real_small.sh takes only --fresh (settings: top of the file)"
check_numbers ADAPT_STEPS DISTILL_STEPS BATCH EVAL_SAMPLES MC_SAMPLES COMPLETIONS
requirements=(requirements.txt)
[[ $SOURCE != *.gguf ]] || requirements+=(requirements-real.txt)
setup_environment "${requirements[@]}"
((FRESH == 0)) || remove_run

read -ra noise <<<"$NOISE"
read -ra more <<<"$ADAPT_FLAGS"
read -ra adaptations <<<"$ADAPTATIONS"
read -ra strategies <<<"$STRATEGIES"
read -ra seeds <<<"$SEEDS"
((${#adaptations[@]} > 0 && ${#seeds[@]} > 0)) || fail "ADAPTATIONS and SEEDS need one word or more each"
[[ ${strategies[0]:-} == bd3lm ]] || fail "STRATEGIES=\"$STRATEGIES\": the first must be bd3lm, which the others are compared with"
distilled=${strategies[1]:-}
if [[ -z $PRECISION ]]; then
  PRECISION=fp32
  if [[ $SIZE == gpu ]] || grep -qswE 'amx_bf16|avx512_bf16' /proc/cpuinfo; then PRECISION=bf16; fi
  [[ $SIZE == gpu || $DRY_RUN == 1 ]] || printf '== matrix products in %s: what this CPU has instructions for (PRECISION)\n' "$PRECISION"
fi
common=(--preset ours ${noise[@]+"${noise[@]}"} --precision "$PRECISION" --global-batch-size "$BATCH"
  --micro-batch-size $((BATCH < 8 ? BATCH : 8)) --beta2 0.98 --lr "$LR" --save-every 500 --keep-last 1 --log-every 5)
dtype=bfloat16
[[ $PRECISION == bf16 ]] || dtype=float32

# teaches STRATEGY: set `rows` to the flags of its objectives; none for denoising only.
teaches() {
  rows=()
  [[ $1 == bd3lm ]] || rows=(--temperature "$TEMPERATURE" --distribution-rows "$ROWS")
}

# adapt_with STRATEGY OUT: the autoregressive model -> a block diffusion model in hub format.
adapt_with() {
  local name=$1 out=$2 gate=() rows
  teaches "$name"
  [[ $out == "$run/hf" ]] || gate=(--skip-parity) # the first one is the release
  [[ $name == bd3lm ]] || rows+=(--teacher-context causal)
  distil "$run/adapted-$name" --student "$run/student" --teacher "$model" --bridge "$run/bridge" --data "$run/data" \
    --strategy "$name" "${common[@]}" --seed "${seeds[0]}" --max-steps "$ADAPT_STEPS" \
    ${PRETRAINING:+--pretraining "$PRETRAINING"} ${rows[@]+"${rows[@]}"} ${more[@]+"${more[@]}"}
  stage "convert-$name" "$PYTHON" -m megatron_tide convert "$run/adapted-$name" "$out" --overwrite --dtype float32 ${gate[@]+"${gate[@]}"}
}

# students SEED ENDING STRATEGY...: the small student, trained with each of these -> $run/STRATEGY ENDING
students() {
  local seed=$1 ending=$2 name rows
  for name in "${@:3}"; do
    teaches "$name"
    distil "$run/$name$ending" "${pair[@]}" --bridge "$run/small-bridge" --data "$run/small-data" --strategy "$name" "${common[@]}" \
      --seed "$seed" --max-steps "$DISTILL_STEPS" ${rows[@]+"${rows[@]}"}
  done
}

# expect SECONDS_DENOISING SECONDS_WITH_TEACHER OUT STEPS STRATEGY...: add the training of each to EXPECTED_SECONDS.
expect() {
  local name seconds
  for name in "${@:5}"; do
    seconds=$2
    [[ $name != bd3lm ]] || seconds=$1
    EXPECTED_SECONDS+=" train-${3//NAME/$name}=$((20 + seconds * $4 * BATCH / 8 / 10))"
  done
}

# Seconds of each stage on 2 cores in bf16, for the time left; those of a step of 8 samples in tenths.
EXPECTED_SECONDS=
if [[ $SIZE == cpu ]]; then
  models=$((${#adaptations[@]} + ${#strategies[@]} + 2)) repeats=$((2 * ${#seeds[@]} - 2)) one=$((EVAL_SAMPLES * MC_SAMPLES / 8))
  [[ $SOURCE != *.gguf ]] || EXPECTED_SECONDS="source=25"
  [[ -n $distilled ]] || repeats=0
  [[ -z $distilled ]] || EXPECTED_SECONDS+=" convert-small=20"
  EXPECTED_SECONDS+=" corpus=20 data=30 small=30 scores=$((30 + models * (one + COMPLETIONS / 2) + repeats * one)) results=10 report=10"
  expect 51 56 adapted-NAME "$ADAPT_STEPS" "${adaptations[@]}"
  for name in "${adaptations[@]}"; do EXPECTED_SECONDS+=" convert-$name=25"; done
  expect 36 53 NAME "$DISTILL_STEPS" "${strategies[@]}"
  for seed in "${seeds[@]:1}"; do expect 36 53 "NAME-seed-$seed" "$DISTILL_STEPS" bd3lm ${distilled:+"$distilled"}; done
fi

main() {
  local model=$SOURCE out=$run/hf name seed one expected=0 named=() repeated=() scored=("$run/scores-first.json")
  if [[ $SOURCE == *.gguf ]]; then
    model=$run/source
    stage source "$PYTHON" -m megatron_tide init-model --from "$SOURCE" --as-is --out "$model" --fresh
  fi
  local lengths=(--student-length "$STUDENT_LENGTH" --teacher-length "$STUDENT_LENGTH" --student-block "$BLOCK" --teacher-block "$BLOCK")
  local pair=(--student "$run/student" --teacher "$model") data=$run/corpus/train.jsonl
  local read=("${pair[@]}" --bridge "$run/bridge" "${lengths[@]}")
  stage corpus "$PYTHON" -m megatron_tide corpus --out "$run/corpus" \
    --then init-model --from "$model" --block-size "$BLOCK" ${MASK_TOKEN:+--mask-token "$MASK_TOKEN"} --out "$run/student" --fresh
  stage data "$PYTHON" -m megatron_tide sample --data "$data" --out "$run/sample.jsonl" \
    --then bridge "${pair[@]}" --sample "$run/sample.jsonl" --out "$run/bridge" \
    --then prepare --data "$data" "${read[@]}" --out "$run/data" \
    --then prepare --data "$run/corpus/test.jsonl" "${read[@]}" --out "$run/test-data"
  for name in "${adaptations[@]}"; do
    adapt_with "$name" "$out"
    named+=(--student "adapted-$name=$out")
    out=$run/hf-${adaptations[${#named[@]} / 2]:-}
  done

  # The first adapted model is the teacher, and some of its layers are the student.
  pair=(--student "$run/small" --teacher "$run/hf")
  stage small "$PYTHON" -m megatron_tide init-model --from "$run/hf" --keep-layers "$KEEP_LAYERS" --out "$run/small" --fresh \
    --then bridge "${pair[@]}" --sample "$run/sample.jsonl" --out "$run/small-bridge" \
    --then prepare --data "$data" "${pair[@]}" --bridge "$run/small-bridge" "${lengths[@]}" --out "$run/small-data"
  students "${seeds[0]}" "" "${strategies[@]}"
  for name in "${strategies[@]}"; do named+=(--student "$run/$name"); done
  if [[ -n $distilled ]]; then
    stage convert-small "$PYTHON" -m megatron_tide convert "$run/$distilled" "$run/hf_small" --overwrite
    for seed in "${seeds[@]:1}"; do
      students "$seed" "-seed-$seed" bd3lm "$distilled"
      repeated+=(--student "$run/bd3lm-seed-$seed" --student "$run/$distilled-seed-$seed")
    done
  fi

  local evaluate=(evaluate --data "$run/test-data" --samples "$EVAL_SAMPLES" --mc-samples "$MC_SAMPLES" --dtype "$dtype" --per-sample) then=()
  if ((${#repeated[@]} > 0)); then
    scored+=("$run/scores-seeds.json")
    then=(--then "${evaluate[@]}" "${repeated[@]}" --json "${scored[1]}")
  fi
  local write=()
  [[ $COMPLETIONS == 0 ]] || write=(--completions "$COMPLETIONS" --completion-tokens 96 --completion-min-tokens 16 --completion-eos-in-order) # as in the quickstart
  stage scores "$PYTHON" -m megatron_tide "${evaluate[@]}" --student small="$run/small" "${named[@]}" \
    --teacher autoregressive="$model" --teacher-context causal --baseline bd3lm --baseline "adapted-${adaptations[0]}" \
    ${write[@]+"${write[@]}"} --json "${scored[0]}" --card ${then[@]+"${then[@]}"}
  stage results "$PYTHON" recipes/real_small/results.py "${scored[@]}" --data "$run/test-data" --writer "adapted-${adaptations[0]}" --out "$run"
  stage report "$PYTHON" -m megatron_tide report "$run"
  [[ $DRY_RUN == 1 && -n $EXPECTED_SECONDS ]] || return 0
  for one in $EXPECTED_SECONDS; do expected=$((expected + ${one#*=})); done
  printf '# expected on 2 cores: %d minutes; seconds: %s\n' $((expected / 60)) "$EXPECTED_SECONDS"
}
# On one line, because bash reads a script while it runs it, and this file may be edited before it has finished.
main; exit
