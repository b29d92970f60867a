#!/usr/bin/env bash
# GPT-3 125M: 12 layers, hidden 768, 12 heads.
#
# source      arXiv 2005.14165, table 2.1
# parameters  125.2 million; published: 125 million
# layout      32 GPUs: data 32
# hardware    published on V100
# ours        layout; all layers attend to all tokens, where every second one of the paper is
#             sparse; bf16, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/125m.sh
#     DRY_RUN=1 bash examples/gpt/125m.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=32 VOCAB_SIZE=50257 launch "${GPT3_RECIPE[@]}" \
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 \
    --micro-batch-size 8 --global-batch-size 256 \
    --train-iters 572204 --lr-decay-iters 495910 \
    --lr 6e-4 --min-lr 6e-5 \
    "$@"
