#!/usr/bin/env bash
# A small model of Llama's shape: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases, an
# output layer of its own.
#
#     make quickstart && bash examples/pretrain_gpt_llama.sh
#
# trains it on the quickstart's text; started again, it goes on where it was interrupted. With
# other data and more processes:
#
#     DATA=text_text_document GPUS_PER_NODE=8 TENSOR_SIZE=2 \
#     TOKENIZER="--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt" \
#     bash examples/pretrain_gpt_llama.sh --train-iters 10000
#
# Without GPUs the processes run on the CPU. Flags behind the script's name are added to those here.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

QUICKSTART=$(realpath -m "$(dirname "${BASH_SOURCE[0]}")/../quickstart")
DATA=${DATA:-$QUICKSTART/bert_text_sentence}
if [[ -z ${VOCAB:-}${TOKENIZER_MODEL:-}${TOKENIZER:-} ]]; then
    TOKENIZER="--tokenizer-type BertWordPieceLowerCase"
    VOCAB=$QUICKSTART/tokenizer/vocab.txt
fi
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
TENSOR_SIZE=${TENSOR_SIZE:-1}
RUN=${RUN:-runs/gpt_llama}

LAYOUT=(--tensor-model-parallel-size "$TENSOR_SIZE")
if [[ $TENSOR_SIZE -gt 1 ]]; then
    LAYOUT+=(--sequence-parallel)
fi

PROGRAM=pretrain_gpt.py launch "${LAYOUT[@]}" \
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 352 \
    --num-attention-heads 8 --num-query-groups 4 \
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --hidden-dropout 0 --attention-dropout 0 \
    --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 16 \
    --train-iters 600 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 \
    --adam-beta2 0.95 --weight-decay 0.1 --init-method-std 0.05 \
    --save-interval 500 --log-interval 20 --eval-interval 200 --eval-iters 8 --split 90,5,5 \
    "$@"
