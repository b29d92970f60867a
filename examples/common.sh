# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share: the recipes of whole families, and how a run is started.
#
# A script sources this file and ends in
#
#     PROGRAM=pretrain_gpt.py GPUS=64 VOCAB_SIZE=50257 launch "${GPT2_RECIPE[@]}" FLAGS... "$@"
#
#     PROGRAM     the program, at the root of the source tree
#     GPUS        how many the configuration is made for; a dry run plans for as many
#     VOCAB_SIZE  tokens of the published model, which a dry run without a tokenizer counts; a run
#                 counts its tokenizer's
#
# README.md lists the variables that users set. Of a flag given twice the last value counts, so
# that what stands behind a script's name wins.
set -euo pipefail

# What the papers did not have yet: it changes the format of numbers and where they are kept.
_TODAY=(--bf16 --use-distributed-optimizer)

# Megatron-LM, arXiv 1909.08053, for BERT and for GPT-2.
_MEGATRON=(
    --optimizer adam --weight-decay 0.01 --clip-grad 1.0
    --hidden-dropout 0.1 --attention-dropout 0.1 --init-method-std 0.02
    "${_TODAY[@]}"
)
BERT_RECIPE=(
    --seq-length 512 --max-position-embeddings 512
    --global-batch-size 1024 --train-iters 2000000
    --lr 1e-4 --lr-decay-style linear --lr-warmup-iters 10000
    "${_MEGATRON[@]}"
)
GPT2_RECIPE=(
    --seq-length 1024 --max-position-embeddings 1024
    --global-batch-size 512 --train-iters 300000
    --lr 1.5e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 3000
    "${_MEGATRON[@]}"
)

# GPT-3, arXiv 2005.14165, appendix B: warm-up over 375 million tokens, cosine over 260 billion. The
# scripts state how many steps of their batch 300 billion and 260 billion tokens are.
GPT3_RECIPE=(
    --seq-length 2048 --max-position-embeddings 2048
    --lr-decay-style cosine --lr-warmup-fraction 0.00144
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --weight-decay 0.1 --clip-grad 1.0
    "${_TODAY[@]}"
)

# Llama 3, arXiv 2407.21783, sections 3.2 and 3.4.1. It states a schedule for the 405B model alone,
# which is taken here: 8000 steps of warm-up, a cosine to a hundredth of the rate, and the batch of
# 4 million tokens with which it begins. Adam's constants are those of Llama 2, arXiv 2307.09288.
LLAMA_RECIPE=(
    --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 500000
    --normalization RMSNorm --layernorm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --global-batch-size 512 --train-iters 1200000 --lr-decay-style cosine --lr-warmup-iters 8000
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5
    --weight-decay 0.1 --clip-grad 1.0
    "${_TODAY[@]}"
)

# T5, arXiv 1910.10683, sections 2.1, 3.1 and 3.7: a million steps of 2048 texts. The paper trains
# with AdaFactor; the rates here are for Adam. Scores are not divided by the root of a head's width,
# so that initial values smaller than usual have to keep them small.
T5_RECIPE=(
    --seq-length 512 --decoder-seq-length 128 --max-position-embeddings 512
    --position-embedding-type relative --attention-scale 1
    --normalization RMSNorm --layernorm-epsilon 1e-6 --activation relu --disable-bias-linear
    --hidden-dropout 0.1 --attention-dropout 0.1 --init-method-std 0.01 --vocab-extra-ids 100
    --global-batch-size 2048 --train-iters 1000000
    --lr 1e-4 --lr-decay-style linear --lr-warmup-iters 10000
    --optimizer adam --weight-decay 0.01 --clip-grad 1.0
    "${_TODAY[@]}"
)

# launch FLAGS...: replaces this process by the run, or by its dry run.
launch() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    _find_data_and_tokenizer
    local run=${RUN:-runs/$(_name)}
    local places=(
        --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 1000
        --metrics-file "$run/metrics.jsonl" --log-interval 10
    )
    local command=("${PYTHON:-python3}")
    if _is_dry "$@"; then
        _plan_for_ranks
        # Without data there is nothing to check but the plan.
        [[ ${#_DATA[@]} -gt 0 ]] || places=()
        [[ ${#_TOKENIZER[@]} -gt 0 ]] || _TOKENIZER=(--vocab-size "$VOCAB_SIZE")
        command+=("$root/$PROGRAM" "${_DRY[@]}")
    else
        [[ ${#_DATA[@]} -gt 0 || " $*" == *" --data-path"* || " $*" == *" --config-file"* ]] ||
            _fail "DATA is not set: the dataset's path without .idx and .bin, or a blend" \
                "of WEIGHT PATH pairs; DRY_RUN=1 needs none"
        _find_nodes "$@"
        command+=(-m torch.distributed.run "${_TORCHRUN[@]}" "$root/$PROGRAM")
    fi
    exec "${command[@]}" "${_DATA[@]}" "${_TOKENIZER[@]}" "${places[@]}" "$@"
}

_find_data_and_tokenizer() {
    local words
    _DATA=() _TOKENIZER=()
    if [[ -n ${DATA:-} ]]; then
        read -rd '' -a words <<<"$DATA" || true # the end of the text is no delimiter
        _DATA=(--data-path "${words[@]}")
    fi
    [[ -z ${VOCAB:-} ]] || _TOKENIZER+=(--vocab-file "$VOCAB")
    [[ -z ${MERGES:-} ]] || _TOKENIZER+=(--merge-file "$MERGES")
    if [[ -n ${TOKENIZER_MODEL:-} ]]; then
        _TOKENIZER+=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER_MODEL")
    fi
    if [[ -n ${TOKENIZER:-} ]]; then
        read -rd '' -a words <<<"$TOKENIZER" || true
        _TOKENIZER+=("${words[@]}")
    fi
}

# Folder and name of the script: bert-345m.
_name() {
    local script
    script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0" .sh)
    echo "$(basename "$(dirname "$script")")-$(basename "$script")"
}

_is_dry() {
    [[ ${DRY_RUN:-0} != 0 || " $* " == *" --dry-run "* ]]
}

_plan_for_ranks() {
    local nodes ranks
    nodes=$(_count NODES 1)
    ranks=$(_count GPUS_PER_NODE 8)
    [[ -n ${NODES:-}${GPUS_PER_NODE:-} ]] && GPUS=$((nodes * ranks))
    _DRY=(--dry-run --world-size "$GPUS")
    [[ -z ${HARDWARE:-} ]] || _DRY+=(--hardware "$HARDWARE")
}

_find_nodes() {
    local nodes ranks
    nodes=$(_count NODES 1)
    ranks=$(_count GPUS_PER_NODE 8)
    _check_layout "$nodes" "$ranks" "$@"
    _TORCHRUN=(--nproc-per-node "$ranks")
    [[ -z ${MAX_RESTARTS:-} ]] || _TORCHRUN+=(--max-restarts "$MAX_RESTARTS")
    if [[ $nodes -eq 1 ]]; then
        _TORCHRUN+=(--standalone)
        return
    fi
    [[ -n ${MASTER_ADDR:-} ]] || _fail "NODES=$nodes needs MASTER_ADDR, the name of the first node"
    _TORCHRUN+=(
        --nnodes "$nodes"
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    )
    [[ -z ${RDZV_ID:-} ]] || _TORCHRUN+=(--rdzv-id "$RDZV_ID")
    # Otherwise each node finds out by itself whether MASTER_ADDR is its own name.
    case ${NODE_RANK:-} in
        "") ;;
        0) _TORCHRUN+=(--rdzv-conf is_host=true) ;;
        *) _TORCHRUN+=(--rdzv-conf is_host=false) ;;
    esac
}

# _check_layout NODES GPUS_PER_NODE FLAGS...: whether models fit, before every rank would say it.
_check_layout() {
    local nodes=$1 ranks=$2 tensor=1 pipeline=1
    while shift && [[ $# -gt 1 ]]; do
        case $1 in
            --tensor-model-parallel-size) tensor=$(_number "$1 $2" "$2") ;;
            --pipeline-model-parallel-size) pipeline=$(_number "$1 $2" "$2") ;;
        esac
    done
    [[ $((nodes * ranks % (tensor * pipeline))) -eq 0 ]] ||
        _fail "NODES=$nodes x GPUS_PER_NODE=$ranks is not a multiple of" \
            "--tensor-model-parallel-size $tensor x --pipeline-model-parallel-size $pipeline"
}

# _count NAME DEFAULT: the value of a variable that counts something.
_count() {
    local value=${!1:-$2}
    _number "$1=$value" "$value"
}

# _number PLACE VALUE: the value, if it is a number; otherwise PLACE is what is wrong.
_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || _fail "$1: expected a number from 1 on"
    echo "$2"
}

_fail() {
    echo "error: $*" >&2
    exit 2
}
