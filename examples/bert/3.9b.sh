#!/usr/bin/env bash
# BERT 3.9B: 48 layers, hidden 2560, 40 heads.
#
# source      arXiv 1909.08053, table 4
# parameters  3.869 billion; published: 3.9 billion
# layout      256 GPUs: tensor 4, data 64
# hardware    published on V100 of 32 GB
# ours        layout; bf16, distributed optimizer, sequence parallelism
#
#     DATA=text_text_sentence VOCAB=vocab.txt bash examples/bert/3.9b.sh
#     DRY_RUN=1 bash examples/bert/3.9b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_bert.py GPUS=256 VOCAB_SIZE=30522 launch "${BERT_RECIPE[@]}" \
    --num-layers 48 --hidden-size 2560 --num-attention-heads 40 \
    --tensor-model-parallel-size 4 --sequence-parallel \
    --micro-batch-size 16 \
    "$@"
